"""The walk gives every block the tensors of a plain forward, keeps what is read later, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call, record, tensors_in
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.structure.towers import Tower
from aerogel.model.walk import Walk
from aerogel.numerics.quantize import quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.tiny import opened


class Cell(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> tuple[torch.Tensor, None]:
        return torch.tanh(self.linear(x)) + shift, None


class Hourglass(nn.Module):
    """Four blocks in an order of its own; the last one reads what the first one gave, through a view and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.cells = nn.ModuleList([Cell(8, 8), Cell(16, 8), Cell(8, 8), Cell(8, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, short: bool = False) -> torch.Tensor:
        first, _ = self.cells[0](self.stem(x))
        kept = first.flip(-1) * 2
        deeper, _ = self.cells[3](first, shift=0.5)
        if not short:
            deeper, _ = self.cells[2](deeper)
        joined = torch.empty(*deeper.shape[:-1], 16)
        joined[..., :8] = deeper
        joined[..., 8:] = kept
        last, _ = self.cells[1](joined)
        return self.head(last)


HOURGLASS = Family("hourglass", ("hourglass",))
ORDER = ("cells.0", "cells.3", "cells.2", "cells.1")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network(Hourglass(), HOURGLASS)
    network.towers = (Tower("cells", tuple(f"cells.{number}" for number in range(4))),)
    return network


@pytest.fixture
def calls() -> list[Call]:
    torch.manual_seed(1)
    return [Call((torch.randn(2, 6),)) for _ in range(3)]


def plain_inputs(network: Network, calls: list[Call]) -> dict[str, list[Call]]:
    runs: list[Callable[[], Any]] = [lambda call=call: network.run(call) for call in calls]
    return {name: record(module, runs) for name, module in network.blocks().items()}


def assert_same(ours: Call, theirs: Call) -> None:
    assert ours.kwargs == theirs.kwargs
    for left, right in zip(ours.args, theirs.args, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_get_the_tensors_of_a_plain_forward(network: Network, calls: list[Call], tmp_path: Path, on_disk: bool) -> None:
    expected = plain_inputs(network, calls)
    seen = []
    for block in Walk(network, calls, folder=tmp_path if on_disk else None):
        seen.append(block.name)
        for _ in range(2):
            for ours, theirs in zip(block.calls, expected[block.name], strict=True):
                assert_same(ours, theirs)
    assert tuple(seen) == ORDER


def test_the_first_sample_of_every_call_of_tokens_can_be_had_alone() -> None:
    network, tokens = opened("llama"), torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    calls = [Call((), {"input_ids": tokens, "use_cache": False}), Call((), {"input_ids": tokens[:2] + 1, "use_cache": False})]
    for block in Walk(network, calls):
        assert block.one_row_each is not None
        assert len(block.one_row_each) == len(calls)
        for one, all_of_it in zip(block.one_row_each, block.calls, strict=True):
            hidden, whole = tensors_in((one.args, one.kwargs))[0], tensors_in((all_of_it.args, all_of_it.kwargs))[0]
            assert len(hidden) == 1 < len(whole)
            torch.testing.assert_close(hidden, whole[:1], rtol=1e-4, atol=1e-5)  # one row is multiplied by another kernel


def test_calls_without_tokens_are_not_taken_apart(network: Network, calls: list[Call]) -> None:
    expected = plain_inputs(network, calls)
    for block in Walk(network, calls):
        assert block.one_row_each is not None
        for ours, theirs in zip(block.one_row_each, expected[block.name], strict=True):
            assert_same(ours, theirs)


def test_blocks_see_what_was_done_to_those_before(network: Network, calls: list[Call]) -> None:
    for block in Walk(network, calls):
        torch.nn.init.constant_(block.module.linear.weight, 0.1)
        expected = plain_inputs(network, calls)[block.name]
        for ours, theirs in zip(block.calls, expected, strict=True):
            assert_same(ours, theirs)


def test_only_outputs_that_are_read_later_are_needed(network: Network, calls: list[Call]) -> None:
    route = Walk(network, calls).route
    assert route.needed_after(1) == {"cells.0", "cells.3"}
    assert route.needed_after(2) == {"cells.0", "cells.2"}
    assert route.needed_after(3) == {"cells.1"}


def test_what_quantized_layers_around_the_blocks_read_is_needed_too(network: Network, calls: list[Call]) -> None:
    scheme = Scheme.parse("W8A16_CHANNEL")
    grid = weight_grid(network.module.head.weight, scheme.weights)
    codes_OI = quantize(network.module.head.weight, grid, scheme.weights)
    network.module.head = QuantLinear.from_codes(network.module.head, scheme, codes_OI, grid)
    assert Walk(network, calls).route.needed_after(3) == {"cells.1"}


def test_the_network_around_its_blocks_comes_last(network: Network, calls: list[Call]) -> None:
    head_inputs = record(network.module.head, [lambda call=call: network.run(call) for call in calls])
    *_, around = Walk(network, calls, around=True)
    assert around.name == ""
    assert set(around.linears()) == {"stem", "head"}
    seen: list[Call] = []
    handle = network.module.head.register_forward_pre_hook(lambda _, args: seen.append(Call(args)))
    for call in around.calls:
        around.run(call)
    handle.remove()
    for ours, theirs in zip(seen, head_inputs, strict=True):
        assert_same(ours, theirs)


def test_calls_that_miss_a_block_leave_it_out(network: Network, calls: list[Call]) -> None:
    mixed = [Call(calls[0].args, {"short": True}), *calls[1:]]
    counts = {block.name: sum(1 for _ in block.calls) for block in Walk(network, [*mixed, Call(calls[0].args, {"short": False})])}
    assert counts == {"cells.0": 4, "cells.3": 4, "cells.2": 3, "cells.1": 4}


def test_nothing_is_left_on_the_module(network: Network, calls: list[Call]) -> None:
    before = network.run(calls[0])
    for _ in Walk(network, calls, around=True):
        pass
    assert torch.equal(network.run(calls[0]), before)
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in network.module.modules())


def test_a_real_error_comes_through(network: Network, calls: list[Call]) -> None:
    walk = Walk(network, calls)
    network.module.cells[3].linear = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        for _ in walk:
            pass
    assert all("forward" not in module.__dict__ for module in network.module.modules())


def test_a_second_walk_goes_on_where_the_first_was_stopped(network: Network, calls: list[Call], tmp_path: Path) -> None:
    def shrink(block: Any) -> None:
        with torch.no_grad():
            block.module.linear.weight.mul_(0.5)

    interrupted = iter(Walk(network, calls, folder=tmp_path))
    for _ in range(2):
        shrink(next(interrupted))
    next(interrupted)  # the third block is in hand, two are committed
    interrupted.close()
    rest = {}
    for block in Walk(network, calls, folder=tmp_path):
        rest[block.name] = [call.map(torch.clone) for call in block.calls]
        shrink(block)
    assert tuple(rest) == ORDER[2:]
    torch.manual_seed(0)
    fresh = Network(Hourglass(), HOURGLASS)
    for block in Walk(fresh, calls):
        if block.name in rest:
            for ours, theirs in zip(rest[block.name], block.calls, strict=True):
                assert_same(ours, theirs)
        shrink(block)


def test_weights_are_resident_only_during_a_visit(network: Network, calls: list[Call]) -> None:
    inside: list[str] = []
    most = 0

    class Counting:
        def enter(self, name: str) -> None:
            nonlocal most
            inside.append(name)
            most = max(most, len(inside))

        def release(self, name: str) -> None:
            inside.remove(name)

    for block in Walk(network, calls, residency=Counting()):
        assert inside == [block.name]
    assert most == 1
    assert not inside


def test_a_block_that_runs_twice_is_refused(network: Network, calls: list[Call]) -> None:
    network.module.cells[2] = network.module.cells[3]
    network.towers = (Tower("cells", ("cells.2",)),)
    with pytest.raises(AerogelError, match=r"cells\.2 runs twice"):
        Walk(network, calls)


def test_no_calls_is_an_error(network: Network) -> None:
    with pytest.raises(AerogelError, match="at least one call"):
        Walk(network, [])


class Codebooks(nn.Module):
    """Four rows of tokens are one sample, as in Musicgen."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cells = nn.Embedding(16, 8), nn.ModuleList([Cell(8, 8), Cell(8, 8)])

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.table(codes.reshape(-1, 4, codes.shape[-1])).sum(1)
        for cell in self.cells:
            x, _ = cell(x)
        return x


def test_rows_that_belong_together_stay_together() -> None:
    network = Network(Codebooks(), HOURGLASS)
    network.towers = (Tower("cells", ("cells.0", "cells.1")),)
    calls = [Call((torch.randint(0, 16, (8, 3)),))]
    expected = plain_inputs(network, calls)
    for block in Walk(network, calls):
        for ours, theirs in zip(block.calls, expected[block.name], strict=True):
            assert_same(ours, theirs)
