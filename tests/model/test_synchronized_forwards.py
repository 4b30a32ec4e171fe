"""Synchronized forwards: groups see every call, changes take effect for what follows, and no hook or forward is left after an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.synchronized_forwards import InputGroup, synchronized_forwards

GROUPS: list[InputGroup] = [("left", "right"), ("behind",)]


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
    return Block("cell", module, 0, 1, calls, Network(module, Family("f", ("f",))))  # type: ignore[arg-type]


def doubled(block: Block) -> Callable[[InputGroup], None]:
    """A change that puts linears of twice the weight in place."""

    def change(group: InputGroup) -> None:
        for name in group:
            new = nn.Linear(4, 4).requires_grad_(False)
            old = block.module.get_submodule(name)
            new.weight.copy_(2 * old.weight)
            new.bias.copy_(old.bias)
            block.replace(name, new)

    return change


def test_groups_are_changed_one_after_another_for_all_calls(block: Block) -> None:
    log: list[tuple[str, InputGroup]] = []
    change = doubled(block)
    synchronized_forwards(
        block, GROUPS, lambda group, x: log.append(("see", group)), lambda group: (log.append(("change", group)), change(group))[1]
    )
    assert log == [(what, group) for group in GROUPS for what in ("see", "see", "see", "change")]


def test_later_groups_and_outputs_come_from_changed_modules(block: Block) -> None:
    brought: dict[InputGroup, list[Tensor]] = {group: [] for group in GROUPS}
    outputs = synchronized_forwards(block, GROUPS, lambda group, x: brought[group].append(x), doubled(block))
    left, right = (block.module.get_submodule(name) for name in GROUPS[0])
    for call, x, product, output in zip(block.calls, brought[GROUPS[0]], brought[GROUPS[1]], outputs, strict=True):
        assert x is call.args[0]
        assert torch.equal(product, left(x) * right(x))
        assert all(torch.equal(a, b) for a, b in zip(output, block.run(call), strict=True))


def test_modules_may_stay_as_they_are(block: Block) -> None:
    outputs = synchronized_forwards(block, GROUPS, lambda group, x: None, lambda group: None)
    for call, output in zip(block.calls, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(output, block.run(call), strict=True))


@pytest.mark.parametrize(("turn", "words"), [("early", "ends"), ("again", "left"), ("apart", "shares its input in some calls only")])
def test_a_call_that_goes_its_own_way_is_an_error(block: Block, turn: str, words: str) -> None:
    calls = list(block.calls)
    block.calls = [*calls[:2], Call(calls[2].args, {"turn": turn})]  # type: ignore[assignment]
    with pytest.raises(AerogelError, match=words):
        synchronized_forwards(block, GROUPS, lambda group, x: None, doubled(block))


def test_gradients_are_on_or_off_as_they_were_on_either_side(block: Block) -> None:
    inside: list[bool] = []
    block.module.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    outside: list[bool] = []
    with torch.enable_grad():
        synchronized_forwards(block, GROUPS, lambda group, x: outside.append(torch.is_grad_enabled()), lambda group: None)
    assert inside == [False] * 3
    assert outside == [True] * 6


@pytest.mark.parametrize("where", ["see", "change", "forward"])
def test_errors_come_out_and_no_hook_or_forward_stays(block: Block, where: str) -> None:
    def fail(group: InputGroup, x: Tensor | None = None) -> None:
        if group == GROUPS[1]:
            raise RuntimeError("inside")

    if where == "forward":
        block.calls = [Call(call.args, {"turn": "fail"}) for call in block.calls]  # type: ignore[assignment]
    modules = list(block.module.children())
    kept = [weakref.ref(call.args[0]) for call in block.calls]
    with pytest.raises(RuntimeError, match="inside"):
        synchronized_forwards(
            block, GROUPS, fail if where == "see" else lambda group, x: None, fail if where == "change" else lambda group: None
        )
    for module in modules:
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
    block.calls = ()
    assert [reference() for reference in kept] == [None] * 3, "a forward that is still paused keeps its tensors"
