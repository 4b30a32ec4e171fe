"""AWQ: the scale a brute-force search over stored activations finds, clips that cost least, folds that change nothing, routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.layers.linear import QuantLinear
from aerogel.layers.scaled_input import ScaledInput
from aerogel.methods.quantization.awq import Awq, clipped
from aerogel.methods.quantization.rtn import Rtn
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from aerogel.numerics.quantize import Grid, fake_quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from aerogel.training.fit import Fit, fit
from tests.tiny import FAMILIES, opened, output

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def first_block(name: str = "llama", calls: list[Call] | None = None) -> Block:
    network = opened(name)
    for parameter in network.module.parameters():
        if parameter.ndim == 1:
            parameter.data[::7] *= 6  # norms with outliers, or there is nothing to scale
    return next(iter(Walk(network, calls or FAMILIES[name].calls(3))))


def inputs_of(block: Block, name: str) -> Tensor:
    """Everything that goes into a part of the block, as rows."""
    seen: list[Tensor] = []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for call in block.calls:
        block.run(call)
    hook.remove()
    return torch.cat(seen)


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return ((groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).flatten(1)


def brute_force(x: Tensor, weights: list[Tensor], duo_scaling: bool) -> Tensor:
    """The published search, by the squared error of the outputs over these inputs."""
    magnitude = x.abs().mean(0)
    share = torch.cat([w.abs().unflatten(1, (-1, 32)) / (w.abs().unflatten(1, (-1, 32)).amax(-1, keepdim=True) + 1e-6) for w in weights])
    candidates = [torch.ones_like(magnitude)]
    for step in range(21):
        scale = magnitude ** (step / 20)
        if duo_scaling:
            scale = scale / (share.flatten(1).mean(0) ** (1 - step / 20) + 1e-4)
        scale = scale.clamp(min=1e-4)
        candidates.append(scale / (scale.max() * scale.min()).sqrt())
    costs = [sum((x @ (rounded(w * s, 3, 32) / s - w).T).square().sum() for w in weights) for s in candidates]
    return candidates[int(torch.stack(costs).argmin())]  # type: ignore[arg-type]


@pytest.mark.parametrize("duo_scaling", [True, False])
def test_the_scale_is_what_brute_force_over_all_batches_finds(duo_scaling: bool) -> None:
    block = first_block()
    x = inputs_of(block, READERS[0])
    weights = [block.module.get_submodule(name).weight.clone() for name in READERS]
    norm = block.module.input_layernorm.weight.clone()  # type: ignore[operator, union-attr]
    Awq("W3A16_G32", duo_scaling=duo_scaling, clip=False).compress(block)
    found = norm / block.module.input_layernorm.weight  # type: ignore[operator]
    expected = brute_force(x, weights, duo_scaling)
    assert not torch.allclose(expected, torch.ones_like(expected))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_later_batches_count() -> None:
    """Batches that want other scales: the choice must be that of all of them, whatever comes first."""
    torch.manual_seed(0)
    calls = [Call((), {"input_ids": torch.randint(low, low + 20, (4, 12)), "use_cache": False}) for low in (0, 40, 80)]
    scales = []
    for order in (calls, calls[::-1], calls[:1]):
        block = first_block(calls=order)
        norm = block.module.input_layernorm.weight.clone()  # type: ignore[operator, union-attr]
        Awq("W3A16_G32").compress(block)
        scales.append(norm / block.module.input_layernorm.weight)  # type: ignore[operator]
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scales[0], scales[2], rtol=1e-3)


def test_value_to_output_scales_are_shared_by_the_heads_that_read_them() -> None:
    block = first_block()
    before = {name: block.module.get_submodule(name).weight.clone() for name in ("self_attn.v_proj", "self_attn.o_proj")}
    norm = block.module.input_layernorm.weight.clone()  # type: ignore[operator, union-attr]
    fold_free = Awq("W8A16_CHANNEL", clip=False)
    fold_free.compress(block)
    s_in = norm / block.module.input_layernorm.weight  # type: ignore[operator]
    value = block.module.get_submodule("self_attn.v_proj").dequantized(torch.float32) / s_in
    out = block.module.get_submodule("self_attn.o_proj").dequantized(torch.float32)
    s_v = (before["self_attn.v_proj"] / value).median(1).values  # (2 heads x 16)
    s_o = (out / before["self_attn.o_proj"]).median(0).values  # (4 heads x 16), two of them for each value head
    spread = s_v.view(2, 1, 16).expand(2, 2, 16).flatten()
    assert float((s_v - 1).abs().max()) > 0.05
    torch.testing.assert_close(s_o, spread, rtol=0.05, atol=0.05)


def test_queries_and_keys_keep_their_range_and_values_are_clipped_where_it_pays() -> None:
    block = first_block()
    norm = block.module.get_submodule("input_layernorm").weight.clone()
    before = {name: block.module.get_submodule(name).weight.clone() for name in READERS}
    Awq("W3A16_G32").compress(block)
    s_in = norm / block.module.get_submodule("input_layernorm").weight
    narrower = {}
    for name in READERS:
        covering = (before[name] * s_in).unflatten(1, (-1, 32)).abs().amax(-1) / 3.5
        narrower[name] = block.module.get_submodule(name).grid().scale / covering
    torch.testing.assert_close(narrower[READERS[0]], torch.ones(64, 2), rtol=1e-4, atol=0)
    torch.testing.assert_close(narrower[READERS[1]], torch.ones(32, 2), rtol=1e-4, atol=0)
    # Rows of values may have been divided on their way out; within a row, clipping shows as unequal ratios.
    assert float((narrower[READERS[2]][:, 0] / narrower[READERS[2]][:, 1] - 1).abs().max()) > 0.05


def clip_cost(weight: Tensor, scale: Tensor, scheme: Scheme, moments: Tensor) -> Tensor:
    """Squared error of each group's own output with these scales, over the squared output; differentiable in the scales."""
    change = (fake_quantize(weight, Grid(scale), scheme.weights) - weight).unflatten(1, (-1, 32))
    groups = weight.unflatten(1, (-1, 32))
    return torch.einsum("ogi,gij,ogj->", change, moments, change) / torch.einsum("ogi,gij,ogj->", groups, moments, groups)


def test_gradients_find_no_better_clips_than_the_search() -> None:
    """The clips are also found by descent, from no clipping and from where the search ended; neither may get far below the search."""
    torch.manual_seed(0)
    scheme = Scheme.parse("W3A16_G32")
    weight = torch.randn(48, 96) * torch.rand(48, 1).exp()
    weight[::5, ::17] *= 4  # outliers, or clipping does not pay
    x = torch.randn(512, 96) @ (torch.eye(96) + 0.3 * torch.randn(96, 96))
    moment = x.T @ x / len(x)
    moments = torch.stack([moment[first : first + 32, first : first + 32] for first in range(0, 96, 32)])
    covering = weight_grid(weight, scheme.weights).scale
    found = clipped(weight, scheme, moment).scale
    searched = float(clip_cost(weight, found, scheme, moments))
    assert searched < 0.85 * float(clip_cost(weight, covering, scheme, moments))
    for start in (covering, found):
        shrink = nn.Parameter(torch.zeros_like(start))

        def loss(_: Sequence[int], start: Tensor = start, shrink: nn.Parameter = shrink) -> Tensor:
            return clip_cost(weight, start * shrink.exp(), scheme, moments)

        history = fit([shrink], loss, 1, Fit(steps=400, batch=1, rate=0.005, check=10, clip=0.0), torch.Generator().manual_seed(0))
        descended = history.checks[history.best]
        assert descended < 0.85 * float(clip_cost(weight, covering, scheme, moments)), "the descent is a rival"
        assert searched <= 1.02 * descended


def cost(name: str, method: Any, family: str = "llama") -> float:
    network, calls = opened(family), FAMILIES[family].calls(4)
    before = [output(network.module, call) for call in calls]
    for block in Walk(network, calls):
        method.compress(block)
    assert any(isinstance(part, QuantLinear) for part in network.module.modules()), name
    return float(sum((output(network.module, call) - exact).square().sum() for call, exact in zip(calls, before, strict=True)))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_it_beats_rounding(family: str) -> None:
    assert cost("awq", Awq("W3A16_G32"), family) < 0.9 * cost("rtn", Rtn("W3A16_G32"), family)


def test_routers_get_the_scale_too() -> None:
    block = first_block("mixtral")
    router = block.module.get_submodule("mlp.gate")
    before, norm = router.weight.clone(), block.module.get_submodule("post_attention_layernorm").weight.clone()
    Awq("W3A16_G32").compress(block)
    scale = norm / block.module.get_submodule("post_attention_layernorm").weight
    assert not torch.allclose(scale, torch.ones_like(scale))
    torch.testing.assert_close(router.weight, before * scale)


@pytest.mark.parametrize("rule", ["skip", "keep"])
def test_linears_that_no_edge_feeds(rule: Any) -> None:
    network, calls = opened("dit"), FAMILIES["dit"].calls(3)
    before = [output(network.module, call) for call in calls]
    for block in Walk(network, calls):
        Awq("W8A16_G32", unmapped=rule).compress(block)
    kept = [part for part in network.module.modules() if isinstance(part, ScaledInput)]
    assert bool(kept) == (rule == "keep")
    for call, exact in zip(calls, before, strict=True):
        assert (output(network.module, call) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("family", "rule"), [("llama", "skip"), ("dit", "keep")])
def test_static_ranges_are_those_of_scaled_inputs(family: str, rule: Any) -> None:
    block = first_block(family)
    name = READERS[0] if rule == "skip" else "attn1.to_q"
    before = inputs_of(block, name)
    Awq("W8A8_STATIC", unmapped=rule, targets=("*attn*",)).compress(block)  # what comes before the attention stays as it is
    layer = block.module.get_submodule(name)
    if isinstance(layer, ScaledInput):
        name, layer = f"{name}.inner", layer.inner
    assert isinstance(layer, QuantLinear)
    x, scale = inputs_of(block, name), 127.5 * float(layer.get_buffer("input_scale"))
    assert scale == pytest.approx(float(x.abs().max()), rel=1e-5)
    assert abs(scale / float(before.abs().max()) - 1) > 0.1, "or nothing was scaled"


def test_an_edge_that_is_quantized_already_is_left_alone() -> None:
    block = first_block()
    Rtn("W8A16_G32", targets=("*v_proj",)).compress(block)
    norm = block.module.input_layernorm.weight.clone()  # type: ignore[operator, union-attr]
    Awq("W3A16_G32").compress(block)
    assert torch.equal(block.module.input_layernorm.weight, norm)  # type: ignore[union-attr]
    assert isinstance(block.module.get_submodule("self_attn.q_proj"), QuantLinear)


def test_an_expert_without_tokens_is_rounded_and_noted() -> None:
    network = opened("mixtral")
    block = next(iter(Walk(network, [Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})])))
    Awq("W4A16_G32").compress(block)
    silent = [note["name"] for note in block.notes if "no token" in note.get("fallback", "")]
    assert len(silent) == 6
    assert isinstance(network, Network)
    assert not any(isinstance(part, nn.Linear) for name, part in block.module.named_modules() if "experts" in name)
