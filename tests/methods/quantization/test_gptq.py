"""GPTQ on small networks: the paper's codes in place, shared inputs, order of columns, stages, bad moments, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.methods.quantization.gptq import Gptq
from aerogel.methods.quantization.rtn import Rtn
from aerogel.model import solutions
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.sequential import stages_of
from aerogel.model.statistics import sharing
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened, output

W4 = "W4A16_G32"


class Pair(nn.Module):
    """Two linears that share an input, one behind them, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(48, 12), nn.Linear(48, 20)
        self.behind, self.idle = nn.Linear(32, 8), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.cat([self.left(x), self.right(x).relu()], -1))


def visit(method: Gptq, calls: int = 6, spoil: str = "", pruned: tuple[str, ...] = ()) -> tuple[Block, dict[str, Tensor], Tensor]:
    """One block after its visit, its weights before, and its inputs as rows."""
    torch.manual_seed(0)
    module = Pair().requires_grad_(False)
    mixing = torch.randn(12, 48)  # inputs of real networks lie near a subspace too
    xs = [(torch.randn(4, 16, 12) @ mixing + 0.3 * torch.randn(4, 16, 48)) * torch.logspace(-0.3, 0.3, 48) for _ in range(calls)]
    for x in xs:
        if spoil == "dead":
            x[..., :3] = 0
        if spoil == "nan":
            x[0, 0, 0] = torch.nan
    block = Block("cell", module, 0, 1, [Call((x,)) for x in xs], Network(module, Family("f", ("f",))))  # type: ignore[arg-type]
    for name in pruned:
        block.prune(name, torch.rand(module.get_parameter(f"{name}.weight").shape) < 0.5)
    before = {name: linear.weight.clone() for name, linear in module.named_children() if isinstance(linear, nn.Linear)}
    method.compress(block)
    return block, before, torch.cat([x.reshape(-1, 48) for x in xs])


def quantized(block: Block, name: str) -> QuantLinear:
    module = block.module.get_submodule(name)
    assert isinstance(module, QuantLinear)
    return module


def paper(weight: Tensor, x_TI: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """The paper's loop in double precision, columns in `order`; scale is per element and already what is stored."""
    weight, x_TI, scale = weight.double().clone()[:, order], x_TI.double()[:, order], scale.double()[:, order]
    hessian = 2 / len(x_TI) * x_TI.T @ x_TI
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = (weight[:, j] / scale[:, j]).round().clamp(-4, 3)
        error = (weight[:, j] - codes[:, j] * scale[:, j]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("act_order", ["none", "static"])
def test_codes_are_those_of_the_paper(act_order: Any) -> None:
    scheme = "W3A16_CHANNEL" if act_order == "none" else "W3A16_G16"
    block, before, x_TI = visit(Gptq(scheme, act_order=act_order, observer="minmax"))
    magnitude = x_TI.double().square().mean(0)
    order = torch.arange(48) if act_order == "none" else magnitude.argsort(descending=True)
    for name in ("left", "right"):
        scale = quantized(block, name).grid().scale
        expected = paper(before[name], x_TI, scale.repeat_interleave(48 // scale.shape[1], 1), order)
        # Single precision may tip a rounding and what follows from it, in a few rows at most.
        assert (quantized(block, name).codes() == expected).all(1).float().mean() >= 0.9


def test_groups_in_the_new_order_keep_an_index() -> None:
    block, _, x_TI = visit(Gptq("W3A16_G16", act_order="group"))
    g_idx = quantized(block, "left").g_idx
    assert g_idx is not None
    order = x_TI.square().mean(0).argsort(descending=True)
    assert torch.equal(g_idx[order].long(), torch.arange(48) // 16)


@pytest.mark.parametrize("options", [{}, {"act_order": "none"}, {"act_order": "group"}, {"observer": "minmax"}, {"true_sequential": True}])
@pytest.mark.parametrize("scheme", ["W3A16_G16", "W3A16_G16_ASYM", "W4A16_CHANNEL"])
def test_outputs_are_closer_than_by_rounding(scheme: str, options: dict[str, Any]) -> None:
    block, before, x_TI = visit(Gptq(scheme, **options))
    rounded, *_ = visit(Rtn(scheme, observer=options.get("observer", "mse")))  # type: ignore[arg-type]

    def error(here: Block, name: str) -> float:
        return float((x_TI @ (quantized(here, name).dequantized(torch.float32) - before[name]).T).square().sum())

    for name in ("left", "right"):
        assert error(block, name) < 0.65 * error(rounded, name)


def test_notes_tell_the_output_error_and_what_fell_back() -> None:
    block, before, x_TI = visit(Gptq("W3A16_G16"))
    notes = {note["name"]: note for note in block.notes}
    assert set(notes) == {"cell.left", "cell.right", "cell.behind", "cell.idle"}
    exact = x_TI @ before["left"].T
    expected = (exact - x_TI @ quantized(block, "left").dequantized(torch.float32).T).square().sum() / exact.square().sum()
    assert notes["cell.left"]["error"] == pytest.approx(float(expected), rel=1e-3)
    assert notes["cell.left"]["damping"] == pytest.approx(0.01)
    assert "fallback" not in notes["cell.left"]
    assert "no token" in notes["cell.idle"]["fallback"]
    rounded, *_ = visit(Rtn("W3A16_G16", observer="mse"))  # type: ignore[arg-type]
    assert torch.equal(quantized(block, "idle").codes(), quantized(rounded, "idle").codes())


def test_linears_of_one_shape_give_the_same_codes_together_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> dict[str, Tensor]:
        network = opened("mixtral")
        for block in Walk(network, FAMILIES["mixtral"].calls(4)):
            Gptq("W4A16_G32").compress(block)
        return {name: part.codes() for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}

    together = codes()
    monkeypatch.setattr(solutions, "BATCH_VALUES", 1)
    apart = codes()
    assert together.keys() == apart.keys()
    assert sum(int((together[name] != apart[name]).sum()) for name in together) <= 1e-3 * sum(c.numel() for c in apart.values())


def test_dead_inputs_are_rounded_as_they_are() -> None:
    block, before, _ = visit(Gptq("W3A16_G16"), spoil="dead")
    part = quantized(block, "left")
    expected = (before["left"][:, :3] / part.grid().scale[:, :1]).round().clamp(-4, 3)
    assert torch.equal(part.codes()[:, :3].float(), expected)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(AerogelError, match=r"cell\.left.*not finite"):
        visit(Gptq("W3A16_G16"), spoil="nan")


def test_a_moment_without_a_factor_means_rounding_and_says_so() -> None:
    block, before, _ = visit(Gptq("W3A16_G16", percdamp=3.0))  # above the bound before it begins
    notes = {note["name"]: note for note in block.notes}
    assert "not positive definite" in notes["cell.left"]["fallback"]
    part = quantized(block, "left")
    expected = (before["left"] / part.grid().scale.repeat_interleave(16, 1)).round().clamp(-4, 3)
    assert torch.equal(part.codes().float(), expected)


def test_true_sequential_stages_see_what_was_quantized_before() -> None:
    stages = [[], ["left", "right"], ["behind"], ["idle"]]
    block, *_ = visit(Gptq("W2A16_G16", true_sequential=True))
    names = [note["name"].removeprefix("cell.") for note in block.notes]
    assert names == [name for stage in stages for name in stage]
    at_once, *_ = visit(Gptq("W2A16_G16"))
    assert torch.equal(quantized(block, "left").codes(), quantized(at_once, "left").codes())
    assert not torch.equal(quantized(block, "behind").codes(), quantized(at_once, "behind").codes())


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8_STATIC", "NVFP4A16", "MXFP4A16"])
def test_every_scheme_keeps_a_network_close(scheme: str) -> None:
    network, calls = opened("llama"), FAMILIES["llama"].calls(4)
    before = [output(network.module, call) for call in calls]
    for block in Walk(network, calls):
        Gptq(scheme).compress(block)
    assert sum(isinstance(part, QuantLinear) for part in network.module.modules()) == 14
    error = sum((output(network.module, call) - exact).square().sum() for call, exact in zip(calls, before, strict=True))
    assert error / sum(exact.square().sum() for exact in before) < (0.1 if "4" in scheme else 0.02)


def codes_of(method: Gptq, family: str = "llama") -> dict[str, Tensor]:
    network = opened(family)
    for block in Walk(network, FAMILIES[family].calls(4)):
        method.compress(block)
        if block.outputs is not None:
            with cache_dequantized(block.module):
                for output, call in zip(block.outputs, block.calls, strict=True):
                    assert torch.equal(output, block.run(call))
    return {name: part.codes() for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}


def test_waiting_calls_give_the_codes_of_one_pass_for_each_stage() -> None:
    together, passes = codes_of(Gptq("W3A16_G32")), codes_of(Gptq("W3A16_G32", true_sequential=True, max_activation_gb=0))
    assert together.keys() == passes.keys()
    assert all(torch.equal(codes, passes[name]) for name, codes in together.items())
    at_once = codes_of(Gptq("W3A16_G32", max_activation_gb=0))
    assert any(not torch.equal(codes, at_once[name]) for name, codes in together.items())


def test_experts_are_not_waited_for() -> None:
    assert all(
        torch.equal(codes, other)
        for codes, other in zip(
            codes_of(Gptq(W4), "mixtral").values(), codes_of(Gptq(W4, max_activation_gb=0), "mixtral").values(), strict=True
        )
    )


def test_true_sequential_takes_all_experts_in_one_stage() -> None:
    network = opened("mixtral")
    block = next(iter(Walk(network, FAMILIES["mixtral"].calls(3))))
    stages = stages_of(sharing(block, Gptq("W4A16_G32").assign(block)))
    assert len(stages) == 4
    assert sorted(map(len, stages)) == [1, 3, 4, 8]


def test_calls_that_go_different_ways_are_not_waited_for() -> None:
    class Forks(Pair):
        def forward(self, x: Tensor, short: bool = False) -> Tensor:
            return self.left(x) if short else super().forward(x)

    module = Forks().requires_grad_(False)
    calls = [Call((torch.randn(3, 16, 48),), {"short": short}) for short in (False, True)]
    block = Block("cell", module, 0, 1, calls, Network(module, Family("f", ("f",))))  # type: ignore[arg-type]
    Gptq("W4A16_G16", ignore=("idle",)).compress(block)
    assert block.outputs is None
    assert {name for name, part in module.named_children() if isinstance(part, QuantLinear)} == {"left", "right", "behind"}


@pytest.mark.parametrize("scheme", [W4, "W4A16_G32_ASYM", "W8A16_CHANNEL", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16"])
@pytest.mark.parametrize("act_order", ["none", "static", "group"])
def test_pruned_weights_stay_zero(scheme: str, act_order: str) -> None:
    """One of two layers that share an input is pruned; the other one is solved with it, and has no zeros to keep."""
    block, before, _ = visit(Gptq(scheme=scheme, act_order=act_order), pruned=("left", "behind"))  # type: ignore[arg-type]
    for name in ("left", "behind", "right"):
        rounded = quantized(block, name).dequantized(torch.float32)
        assert (rounded[before[name] == 0] == 0).all()
        assert rounded[before[name] != 0].count_nonzero() > 0.5 * before[name].count_nonzero()


@pytest.mark.parametrize("scheme", [W4, "W4A16_G32_ASYM", "W8A16_CHANNEL"])
def test_pruned_weights_are_compensated(scheme: str) -> None:
    errors = []
    for method in (Gptq(scheme=scheme), Gptq(scheme=scheme, percdamp=1e6)):  # the second one rounds to nearest
        block, before, x = visit(method, pruned=("left", "behind"))
        errors.append(float((x @ (quantized(block, "left").dequantized(torch.float32) - before["left"]).T).norm()))
    assert errors[0] < 0.9 * errors[1]
