"""Forwards in step: gates see every call, changes take effect for what follows, and nothing stays behind, whatever goes wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Family, Tower
from aerogel.model.lockstep import Gate, lockstep
from aerogel.model.network import Network

GATES: list[Gate] = [("left", "right"), ("behind",)]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.behind = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, turn: str = "") -> tuple[Tensor, Tensor]:
        if turn == "early":
            return x, x
        left = self.left(x)
        right = self.right(x + 0 if turn == "apart" else x)
        y = self.behind(left * right)
        if turn == "again":
            y = self.left(y)
        if turn == "fail":
            raise RuntimeError("inside")
        return y, left


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    module = Pair().requires_grad_(False)
    calls = [Call((torch.randn(2, 4),)) for _ in range(3)]
    return Block("cell", module, 0, 1, calls, Network(module, Family("f", ("f",), (Tower("t", "cell"),))))  # type: ignore[arg-type]


def doubled(block: Block) -> Callable[[Gate], None]:
    """A change that puts linears of twice the weight in place."""

    def change(gate: Gate) -> None:
        for name in gate:
            new = nn.Linear(4, 4).requires_grad_(False)
            old = block.module.get_submodule(name)
            new.weight.copy_(2 * old.weight)
            new.bias.copy_(old.bias)
            block.replace(name, new)

    return change


def test_gates_open_one_after_another_for_all_calls(block: Block) -> None:
    log: list[tuple[str, Gate]] = []
    change = doubled(block)
    lockstep(block, GATES, lambda gate, x: log.append(("see", gate)), lambda gate: (log.append(("change", gate)), change(gate))[1])
    assert log == [(what, gate) for gate in GATES for what in ("see", "see", "see", "change")]


def test_later_gates_and_outputs_come_from_changed_modules(block: Block) -> None:
    brought: dict[Gate, list[Tensor]] = {gate: [] for gate in GATES}
    outputs = lockstep(block, GATES, lambda gate, x: brought[gate].append(x), doubled(block))
    left, right = (block.module.get_submodule(name) for name in GATES[0])
    for call, x, product, output in zip(block.calls, brought[GATES[0]], brought[GATES[1]], outputs, strict=True):
        assert x is call.args[0]
        assert torch.equal(product, left(x) * right(x))
        assert all(torch.equal(a, b) for a, b in zip(output, block.run(call), strict=True))


def test_modules_may_stay_as_they_are(block: Block) -> None:
    outputs = lockstep(block, GATES, lambda gate, x: None, lambda gate: None)
    for call, output in zip(block.calls, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(output, block.run(call), strict=True))


@pytest.mark.parametrize(("turn", "words"), [("early", "ends"), ("again", "left"), ("apart", "shares its input in some calls only")])
def test_a_call_that_goes_its_own_way_is_an_error(block: Block, turn: str, words: str) -> None:
    calls = list(block.calls)
    block.calls = [*calls[:2], Call(calls[2].args, {"turn": turn})]  # type: ignore[assignment]
    with pytest.raises(AerogelError, match=words):
        lockstep(block, GATES, lambda gate, x: None, doubled(block))


def test_gradients_are_on_or_off_as_they_were_on_either_side(block: Block) -> None:
    inside: list[bool] = []
    block.module.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    outside: list[bool] = []
    with torch.enable_grad():
        lockstep(block, GATES, lambda gate, x: outside.append(torch.is_grad_enabled()), lambda gate: None)
    assert inside == [False] * 3
    assert outside == [True] * 6


@pytest.mark.parametrize("where", ["see", "change", "forward"])
def test_errors_come_out_and_no_hook_or_forward_stays(block: Block, where: str) -> None:
    def fail(gate: Gate, x: Tensor | None = None) -> None:
        if gate == GATES[1]:
            raise RuntimeError("inside")

    if where == "forward":
        block.calls = [Call(call.args, {"turn": "fail"}) for call in block.calls]  # type: ignore[assignment]
    modules = list(block.module.children())
    kept = [weakref.ref(call.args[0]) for call in block.calls]
    with pytest.raises(RuntimeError, match="inside"):
        lockstep(block, GATES, fail if where == "see" else lambda gate, x: None, fail if where == "change" else lambda gate: None)
    for module in modules:
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    block.calls = ()
    assert [reference() for reference in kept] == [None] * 3, "a forward that still stands somewhere keeps its tensors"
