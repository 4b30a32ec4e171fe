"""SmoothQuant: the published formula, the function kept on every family, the search by brute force, less error with outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.quantization.rtn import Rtn
from aerogel.methods.quantization.smoothquant import Smoothquant
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened, output

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def outliers() -> Network:
    """A llama whose norms blow up a few channels, which is what trained ones do."""
    network = opened("llama")
    for name, parameter in network.module.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::16] *= 40
    return network


def inputs_of(block: Block, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for call in block.calls:
        block.run(call)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_the_scale_is_the_papers(alpha: float) -> None:
    block = next(iter(Walk(outliers(), FAMILIES["llama"].calls(3))))
    x, norm = inputs_of(block, READERS[0]), block.module.get_submodule("input_layernorm").weight.clone()
    weights = torch.cat([block.module.get_submodule(name).weight.clone() for name in READERS])
    Smoothquant(alpha=alpha).compress(block)
    expected = x.abs().amax(0) ** alpha / weights.abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(block.module.get_submodule("input_layernorm").weight, norm / expected, rtol=1e-4, atol=1e-6)
    after = torch.cat([block.module.get_submodule(name).weight for name in READERS])
    torch.testing.assert_close(after, weights * expected, rtol=1e-4, atol=1e-6)


def test_the_scale_is_that_of_all_experts_tokens() -> None:
    block = next(iter(Walk(opened("qwen3_moe"), FAMILIES["qwen3_moe"].calls(1))))
    x, norm = inputs_of(block, "mlp"), block.module.get_submodule("post_attention_layernorm").weight.clone()
    assert len(inputs_of(block, "mlp.experts.0.gate_proj")) < len(x)
    readers = [f"mlp.experts.{number}.{part}_proj" for number in range(4) for part in ("gate", "up")]
    weights = torch.cat([block.module.get_submodule(name).weight.clone() for name in readers])
    Smoothquant(alpha=0.5).compress(block)
    expected = x.abs().amax(0) ** 0.5 / weights.abs().amax(0) ** 0.5
    torch.testing.assert_close(block.module.get_submodule("post_attention_layernorm").weight, norm / expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "include_linear_sources": True},
        pytest.param({"alpha": "search", "include_linear_sources": True, "rows": 32}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_what_it_did(family: str, options: dict[str, Any]) -> None:
    network, calls = opened(family), FAMILIES[family].calls(3)
    before = [output(network.module, call) for call in calls]
    for block in Walk(network, calls):
        Smoothquant(**options).compress(block)
    for call, exact in zip(calls, before, strict=True):
        torch.testing.assert_close(output(network.module, call), exact, rtol=1e-3, atol=2e-4 * float(exact.abs().max()))


def test_the_search_finds_what_brute_force_finds() -> None:
    network = outliers()
    block = next(iter(Walk(network, FAMILIES["llama"].calls(3))))
    x = inputs_of(block, READERS[0])
    weights = torch.cat([block.module.get_submodule(name).weight.clone() for name in READERS])

    def int8(t: Tensor) -> Tensor:
        scale = t.abs().amax(-1, keepdim=True) / 127.5
        return (t / scale).round().clamp(-128, 127) * scale

    costs = {}
    for step in range(21):
        scale = x.abs().amax(0) ** (step / 20) / weights.abs().amax(0) ** (1 - step / 20)
        exact = x @ weights.T
        error = int8(x / scale) @ int8(weights * scale).T - exact
        costs[step / 20] = float((error.square().sum(1) / exact.square().sum(1)).mean())
    Smoothquant(alpha="search", rows=10_000).compress(block)
    chosen = {note["name"]: note["alpha"] for note in block.notes}[f"{block.name}.{READERS[0]}"]
    assert costs[chosen] <= min(costs.values()) * (1 + 1e-3)
    assert costs[chosen] < 0.9 * costs[0.0]


def quantized_error(*methods: Any) -> float:
    network, calls = outliers(), FAMILIES["llama"].calls(4)
    before = [output(network.module, call) for call in calls]
    for block in Walk(network, calls):
        for method in methods:
            method.compress(block)
    return float(sum((output(network.module, call) - exact).square().sum() for call, exact in zip(calls, before, strict=True)))


def test_outliers_hurt_less_after_smoothing() -> None:
    plain = quantized_error(Rtn("W8A8"))
    assert quantized_error(Smoothquant(), Rtn("W8A8")) < 0.5 * plain
    assert quantized_error(Smoothquant(alpha="search"), Rtn("W8A8")) < 0.5 * plain


def test_a_channel_that_was_always_zero_keeps_its_scale() -> None:
    network = opened("llama")
    norm = network.module.get_submodule("model.layers.0.input_layernorm").weight
    norm.data[5] = 0
    block = next(iter(Walk(network, FAMILIES["llama"].calls(2))))
    column = block.module.get_submodule(READERS[0]).weight[:, 5].clone()
    Smoothquant().compress(block)
    assert torch.equal(block.module.get_submodule(READERS[0]).weight[:, 5], column)


@pytest.mark.parametrize(
    ("options", "words"), [({"alpha": 1.5}, "from 0 to 1"), ({"alpha": "search", "scheme": "W4A16_G32"}, "does not quantize inputs")]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    block = next(iter(Walk(opened("llama"), FAMILIES["llama"].calls(1))))
    with pytest.raises(AerogelError, match=words):
        Smoothquant(**options).compress(block)


def test_what_is_quantized_already_is_left_alone() -> None:
    """The source of an edge, a modulation here, may be quantized by an earlier step; that ended the run when its block came."""
    tiny = FAMILIES["dit"]
    path = {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["*norm1.linear"]}}
    rest = {"rtn": {"scheme": "W8A8", "ignore": ["*norm1.linear"]}}
    result = aerogel.compress(tiny.build(), {"steps": [path, {"smoothquant": {}}, rest]}, samples=tiny.calls(2), measures=())
    assert not [line for line in result.journal if line["method"] == "smoothquant" and "to_q" in line["name"]]
    result = aerogel.compress(tiny.build(), {"steps": [{"smoothquant": {}}, path, rest]}, samples=tiny.calls(2), measures=())
    assert [line for line in result.journal if line["method"] == "smoothquant" and "to_q" in line["name"]]
