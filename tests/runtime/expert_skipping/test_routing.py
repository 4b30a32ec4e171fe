"""Dropped pairs are not computed, whatever runs the experts; what goes on comes off; kinds of tokens are told apart in every phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping import backend
from aerogel.runtime.expert_skipping.counting import DECODING, PREFILL, Tally, counting
from aerogel.runtime.expert_skipping.routing import Routed, Skipping, experts_of, router_of, shape_of, skipping
from aerogel.runtime.token_types import PADDING, SPECIAL, TEXT, VISION, Vocabulary
from tests.tiny import FAMILIES, IMAGE_TOKEN, output

MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "internvl"]


def opened(name: str, unfuse_experts: bool) -> Network:
    return open_model(FAMILIES[name].build(), unfuse_experts=unfuse_experts)


def weak(routed: Routed) -> Tensor:
    """Keep what weighs at least half of a token."""
    return routed.share_TK >= 0.5


def nothing(routed: Routed) -> Tensor:
    return torch.zeros_like(routed.index_TK, dtype=torch.bool)


def everything(routed: Routed) -> Tensor:
    return torch.ones_like(routed.index_TK, dtype=torch.bool)


def skip(network: Network, rule: Any, **switches: Any) -> Skipping:
    return Skipping(rule, Vocabulary.of(network), **{"protect": False, **switches})


def told(call: Call, logits: Tensor) -> Tensor:
    """The logits of what is no padding."""
    return logits[call.kwargs["attention_mask"].bool()]


@contextmanager
def masked(network: Network, rule: Any) -> Iterator[None]:
    """The same by weights of zero: every pair is computed, by the family's own code."""
    handles = []
    for layer, module in enumerate(experts_of(network).values()):

        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor], layer: int = layer) -> tuple[Tensor, Tensor, Tensor]:
            x_TH, index_TK, weight_TK = args
            share_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
            kept_TK = rule(Routed(layer, x_TH, share_TK, index_TK, torch.zeros(1, len(x_TH)), False, None))
            return x_TH, index_TK, weight_TK * kept_TK

        handles.append(module.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("unfuse_experts", [True, False], ids=["one by one", "fused"])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("rule", [weak, nothing, everything])
def test_is_what_weights_of_zero_give(name: str, unfuse_experts: bool, rule: Any) -> None:
    network = opened(name, unfuse_experts)
    for call in FAMILIES[name].calls(3):
        with masked(network, rule):
            expected = output(network.module, call)
        with skipping(network, skip(network, rule)):
            got = output(network.module, call)
        assert got.isfinite().all()
        torch.testing.assert_close(told(call, got), told(call, expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8"])
@pytest.mark.parametrize("rule", [weak, nothing])
def test_quantized_experts_are_skipped_alike(scheme: str, rule: Any) -> None:
    """Each runs through its own kernel on the tokens that are left."""
    tiny = FAMILIES["qwen3_vl_moe"]
    recipe = {"steps": [{"rtn": {"scheme": scheme}}]}
    network = aerogel.compress(tiny.build(), recipe, samples=tiny.calls(1), measures=()).network
    ran: list[int] = []
    for expert in next(iter(experts_of(network).values())).children():
        expert.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    for call in tiny.calls(2):
        with cache_dequantized(network.module), masked(network, rule):
            expected = output(network.module, call)
        ran.clear()
        with cache_dequantized(network.module), skipping(network, skip(network, rule)), counting(network, Vocabulary.of(network)) as tally:
            got = output(network.module, call)
        torch.testing.assert_close(told(call, got), told(call, expected), rtol=0, atol=2e-5)
        assert sum(ran) == int(tally.kept_LKP[0].sum())


@pytest.mark.parametrize("unfuse_experts", [True, False], ids=["one by one", "fused"])
@pytest.mark.parametrize("name", MIXTURES)
def test_comes_off_to_the_bit(name: str, unfuse_experts: bool) -> None:
    network, call = opened(name, unfuse_experts), FAMILIES[name].calls(1)[0]
    getattr(network.module.model, "language_model", network.module).set_experts_implementation("grouped_mm")
    before, hooks = output(network.module, call), hooked(network)
    with suppress(ZeroDivisionError), skipping(network, skip(network, weak), attention=True):
        assert not torch.equal(output(network.module, call), before)
        raise ZeroDivisionError
    assert torch.equal(output(network.module, call), before)
    assert hooked(network) == hooks
    assert network.config.get_text_config()._experts_implementation == "grouped_mm"
    assert network.config.get_text_config()._attn_implementation == ("eager" if name == "gpt_oss" else "sdpa")


def hooked(network: Network) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in network.module.modules())


@pytest.mark.parametrize("name", MIXTURES)
def test_memory_that_nobody_wrote_is_never_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the last group of a grouped product hold anything: here they hold NaN."""
    network, real = opened(name, unfuse_experts=False), backend.grouped_product

    def poisoned(x_PI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
        y_PO = real(x_PI, weight_EIO, end_E)
        y_PO[int(end_E[-1]) :] = torch.nan
        return y_PO

    monkeypatch.setattr(backend, "grouped_product", poisoned)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the form whose shapes stay
    module = next(iter(experts_of(network).values()))
    x_TH, index_TK, weight_TK = torch.randn(9, 64), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    fixed = backend.forward(module, x_TH, index_TK, weight_TK.masked_fill(index_TK == 4, 0.0))
    monkeypatch.undo()
    loop = backend.forward(module, x_TH, index_TK, weight_TK.masked_fill(index_TK == 4, 0.0))
    torch.testing.assert_close(fixed, loop, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stock", ["grouped_mm", "batched_mm", "eager"])
def test_a_stock_implementation_is_refused_while_a_rule_is_on(stock: str) -> None:
    network, call = opened("qwen3_moe", unfuse_experts=False), FAMILIES["qwen3_moe"].calls(1)[0]
    module: Any = network.module
    with skipping(network, skip(network, weak)):
        module.set_experts_implementation(stock)
        with pytest.raises(AerogelError, match=f"was set to '{stock}' while a policy"):
            output(module, call)


def test_padding_loses_all_and_is_not_counted() -> None:
    network = opened("qwen3_moe", unfuse_experts=True)
    call = FAMILIES["qwen3_moe"].calls(2)[1]  # three positions are padded on the left
    with skipping(network, skip(network, everything)), counting(network, Vocabulary.of(network)) as tally:
        output(network.module, call)
    assert tally.tokens_LKP[:, PADDING, PREFILL].tolist() == [3, 3]
    assert tally.kept_LKP[:, PADDING].sum() == 0
    assert tally.ratio() == 0
    assert int(tally.assignments_LKP[0, :PADDING].sum()) == 2 * int(call.kwargs["attention_mask"].sum())
    with skipping(network, skip(network, nothing)), counting(network, Vocabulary.of(network)) as tally:
        output(network.module, call)
    assert tally.ratio() == 1


def test_marks_keep_their_experts_unless_told_otherwise() -> None:
    network = opened("qwen3_moe", unfuse_experts=True)
    ids = torch.tensor([[1, 7, 8, 2]])  # begins and ends with marks
    for protect, kept in ((True, [0, 0, 4, 0]), (False, [0, 0, 0, 0])):
        with skipping(network, skip(network, nothing, protect=protect)), counting(network, Vocabulary.of(network)) as tally:
            network.run(Call((), {"input_ids": ids}))
        assert tally.kept_LKP[0, :, PREFILL].tolist() == kept
        assert tally.assignments_LKP[0, :, PREFILL].tolist() == [4, 0, 4, 0]
        assert tally.dropped_LKP[0, TEXT, PREFILL] == 2
        assert tally.ratio() == (0.5 if protect else 1.0)


def test_keep_top1_leaves_no_token_without_experts() -> None:
    network, call = opened("mixtral", unfuse_experts=True), FAMILIES["mixtral"].calls(1)[0]
    with skipping(network, skip(network, nothing, keep_top1=True)), counting(network, Vocabulary.of(network)) as tally:
        output(network.module, call)
    assert tally.dropped_LKP.sum() == 0
    assert tally.ratio() == 0.5


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_weights_are_raised_to_what_they_were_together(name: str) -> None:
    """A router's scaling factor stays in them."""
    network, call = opened(name, unfuse_experts=True), FAMILIES[name].calls(1)[0]
    module = next(iter(experts_of(network).values()))
    given: list[Tensor] = []
    sums: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: sums.append(args[2].sum(-1)))
    with skipping(network, skip(network, nothing, keep_top1=True, renormalise=True)):
        handle = module.register_forward_pre_hook(lambda _, args: given.append(args[2]))
        output(network.module, call)
        handle.remove()
    assert ((given[0] != 0).sum(-1) == 1).all()
    torch.testing.assert_close(given[0].sum(-1), sums[0])


def test_identity_gives_lost_tokens_what_their_experts_would_have_read() -> None:
    network, call = opened("mixtral", unfuse_experts=True), FAMILIES["mixtral"].calls(1)[0]
    module = next(iter(experts_of(network).values()))
    seen: list[tuple[Tensor, Tensor]] = []
    with skipping(network, skip(network, nothing, bypass="identity")):
        handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        output(network.module, call)
        handle.remove()
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl"])
def test_positions_of_images_are_vision(name: str) -> None:
    network, call = opened(name, unfuse_experts=True), FAMILIES[name].calls(1)[0]
    with counting(network, Vocabulary.of(network)) as tally:
        output(network.module, call)
    expected = int((call.kwargs["input_ids"] == IMAGE_TOKEN).sum())
    assert expected > 0
    assert tally.tokens_LKP[:, VISION, PREFILL].tolist() == [expected, expected]


def generate(network: Network, call: Call, tokens: int = 4) -> Tensor:
    module: Any = network.module
    inputs = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    return module.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("unfuse_experts", [True, False], ids=["one by one", "fused"])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_works_inside_generate_with_a_cache_and_padding_on_the_left(name: str, unfuse_experts: bool) -> None:
    """Written tokens are text; what is written for two prompts at once is what is written for each alone."""
    network, call = opened(name, unfuse_experts), FAMILIES[name].calls(2)[1]
    with skipping(network, skip(network, weak)), counting(network, Vocabulary((IMAGE_TOKEN,), ())) as tally:
        both = generate(network, call)
    written = tally.tokens_LKP[0, :, DECODING]
    assert written[TEXT] + written[VISION] == 2 * 3
    assert not (both[:, -4:] == IMAGE_TOKEN).any()
    assert written[VISION] == written[SPECIAL] == written[PADDING] == 0
    alone = {key: value[1:] if isinstance(value, Tensor) else value for key, value in call.kwargs.items()}
    if "pixel_values" in alone:
        alone["pixel_values"] = call.kwargs["pixel_values"][32:]  # the second of two images of 32 patches
    length = int(alone["attention_mask"].sum())
    short = {
        key: value[:, -length:] if key in ("input_ids", "attention_mask", "mm_token_type_ids") else value for key, value in alone.items()
    }
    with skipping(network, skip(network, weak)):
        assert torch.equal(generate(network, Call((), short))[:, -4:], both[1:, -4:])


def test_a_forward_without_token_ids_is_refused() -> None:
    network = opened("qwen3_moe", unfuse_experts=True)
    with skipping(network, skip(network, weak)), pytest.raises(AerogelError, match="without input_ids"):
        network.run(Call((), {"inputs_embeds": torch.randn(1, 3, 64)}))


def test_a_network_without_experts_is_refused() -> None:
    with pytest.raises(AerogelError, match="this llama model has no routed experts"):
        experts_of(opened("llama", unfuse_experts=True))


def test_attention_that_tokens_receive_is_summed_over_what_is_no_padding() -> None:
    network, call = opened("qwen3_moe", unfuse_experts=True), FAMILIES["qwen3_moe"].calls(2)[1]
    seen: list[Routed] = []

    def rule(routed: Routed) -> Tensor:
        seen.append(routed)
        return everything(routed)

    with skipping(network, skip(network, rule), attention=True):
        output(network.module, call)
    received_BS, alive_BS = seen[0].received_BS, call.kwargs["attention_mask"].bool()
    assert received_BS is not None
    torch.testing.assert_close(received_BS.sum(1), alive_BS.sum(1).float())  # every query that counts gives one
    assert (received_BS[~alive_BS] < 1e-6).all()


def test_shape_and_router() -> None:
    network = opened("deepseek_v3", unfuse_experts=True)
    assert vars(shape_of(network)) == {"layers": 1, "experts": 4, "top_k": 2}  # the first layer is dense
    assert router_of(network, "model.layers.1.mlp.experts") is network.module.get_submodule("model.layers.1.mlp.gate")


def test_a_tally_of_nothing_has_no_ratio() -> None:
    assert str(Tally.empty(2, torch.device("cpu")).ratio()) == "nan"
