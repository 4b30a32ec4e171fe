"""Stretches of blocks that are left out: what they added is added again, blocks really do not run, streams and runs stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.block_cache import (
    BlockCacheState,
    BlockRange,
    Rule,
    TableRule,
    block_cache_state,
    caching_blocks,
    residuals,
)
from tests.runtime.feature_cache.test_schedule import STEPS, calls
from tests.tiny import FAMILIES, fill, opened, output

NAMES = ["dit", "pixart", "wan", "sd3", "flux", "cogvideox"]
DEPTH = 5
COUNTS = {"flux": {"num_layers": 2, "num_single_layers": 3}}
"""Settings that make five blocks, where they are not `num_layers` alone."""
GIVEN = {"sd3": ("encoder_hidden_states", "hidden_states"), "flux": ("encoder_hidden_states", "hidden_states")} | {
    "cogvideox": ("hidden_states", "encoder_hidden_states")
}
"""What blocks give, by the name under which the next one takes it; elsewhere the image alone."""
AT = BlockCacheState(steps=STEPS, sampler="", blocks=DEPTH)


def deep(name: str) -> Network:
    """A tiny network of five blocks."""
    tiny = FAMILIES[name]
    shallow = tiny.build()
    torch.manual_seed(0)
    settings = dict(shallow.config) | COUNTS.get(name, {"num_layers": DEPTH})
    module = type(shallow).from_config(settings).float().eval()  # type: ignore[attr-defined]
    fill(module, torch.Generator().manual_seed(0))
    return Network(module.requires_grad_(False), catalog.find("families", tiny.family))


def ran(network: Network) -> list[int]:
    """Grows by the place of each block whose last linear layer runs."""
    found: list[int] = []
    for place, block in enumerate(network.blocks().values()):
        *_, layer = (part for part in block.modules() if isinstance(part, torch.nn.Linear))
        layer.register_forward_hook(lambda *_, place=place: found.append(place))
    return found


def taken(network: Network, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The streams among the arguments of a block, in the order in which blocks give them."""
    if args:
        return args[:1]
    return tuple(kwargs[name] for name in GIVEN[network.family.name])


def each(made: Any) -> tuple[Tensor | None, ...]:
    """The streams that a block gave."""
    return made if isinstance(made, tuple) else (made,)


def literal(network: Network, given: Sequence[Call], table: Sequence[int | None], ranges: Sequence[BlockRange]) -> list[Tensor]:
    """All blocks run always; behind a block range that is left out the streams are set to what went in plus what it added last."""
    entered: dict[int, tuple[Tensor, ...]] = {}
    added: dict[int, list[Tensor | None]] = {}
    row = 0

    def before(place: int, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[place] = taken(network, args, kwargs)

    def after(place: int, _: object, __: object, made: Any) -> Any:
        for number, (first, last) in enumerate(ranges):
            if place + 1 == last:
                if table[row] == number and number in added:
                    sums = [None if b is None else a + b for a, b in zip(entered[first], added[number], strict=True)]
                    return tuple(sums) if isinstance(made, tuple) else sums[0]
                if table[row] is None or row == 0:
                    added[number] = [None if a is None else a - b for a, b in zip(each(made), entered[first], strict=True)]
        return None

    blocks = list(network.blocks().values())
    hooks = [block.register_forward_pre_hook(partial(before, place), with_kwargs=True) for place, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(partial(after, place)) for place, block in enumerate(blocks)]
    made = []
    for call in given:
        made.append(output(network.module, call))
        row += 1
    for hook in hooks:
        hook.remove()
    return made


TABLES: list[tuple[list[int | None], tuple[BlockRange, ...]]] = [
    ([None, 0, 0, None], ((0, DEPTH),)),
    ([None, 0, None, 0], ((1, DEPTH),)),
    ([None, 0, 1, None], ((2, DEPTH), (0, 3))),
    ([0, 0, 1, 1], ((1, 3), (2, 4))),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("table", "ranges"), TABLES)
def test_a_table_answers_like_hooks_that_set_the_stream(name: str, table: list[int | None], ranges: tuple[BlockRange, ...]) -> None:
    network = deep(name)
    wanted = literal(network, calls(name), table, ranges)
    found = ran(network)
    with caching_blocks(network, AT, lambda: TableRule(ranges, table)) as spans:
        for row, (call, answer) in enumerate(zip(calls(name), wanted, strict=True)):
            found.clear()
            assert torch.equal(output(network.module, call), answer)
            out = table[row] if row else None
            first, last = (0, 0) if out is None else ranges[out]
            assert set(found) == set(range(DEPTH)) - set(range(first, last))
    assert spans.decisions == [(row, table[row] if row else None) for row in range(len(STEPS))]


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_on_comes_off(name: str) -> None:
    network = deep(name)
    wanted = [output(network.module, call) for call in calls(name)]
    before = {part: set(module.__dict__) for part, module in network.module.named_modules()}
    with caching_blocks(network, AT, lambda: TableRule(((0, DEPTH),), [None, 0, 0, 0])) as spans:
        given = [output(network.module, call) for call in calls(name)]
    assert not torch.equal(given[2], wanted[2])
    assert {part: set(module.__dict__) for part, module in network.module.named_modules()} == before
    assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls(name), wanted, strict=True))
    text = 7 if name in ("flux", "cogvideox") else 0  # the last block of SD3 drops it
    assert spans.peak_bytes == given[0].shape[0] * (_tokens(network, name) + text) * 64 * 4


def _tokens(network: Network, name: str) -> int:
    return next(residuals(network, Trajectories.of(network, calls(name)))).shape[1]


def test_memory_is_let_go_when_nobody_wants_it() -> None:
    network = deep("dit")
    tables: dict[tuple[int | None, ...], int] = {(None, None, None, None): 0, (None, 0, None, None): 1, (None, 0, 1, None): 2}
    for table, entries in tables.items():
        with caching_blocks(network, AT, lambda table=table: TableRule(((0, 2), (2, 5)), table)) as spans:
            for call in calls("dit"):
                output(network.module, call)
        assert spans.peak_bytes == entries * 2 * 16 * 64 * 4


def test_runs_and_branches_do_not_see_each_other() -> None:
    network = deep("dit")
    rule = partial(TableRule, ((1, DEPTH),), [None, 0, 0, None])
    alone = []
    for seed in (0, 4):
        with caching_blocks(network, AT, rule):
            alone.append([output(network.module, call) for call in calls("dit", seed)])
    with caching_blocks(network, AT, rule) as spans:
        for seed, wanted in zip((0, 4), alone, strict=True):
            assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit", seed), wanted, strict=True))
            for call in calls("dit")[:2]:  # given up
                output(network.module, call)
        spans.reset()
        for first, second, *wanted in zip(calls("dit"), calls("dit", 4), *alone, strict=True):  # two branches, call by call
            assert torch.equal(output(network.module, first), wanted[0])
            assert torch.equal(output(network.module, second), wanted[1])


def test_another_shape_in_the_middle_of_a_run_runs_all_blocks() -> None:
    network = deep("dit")
    first, second, third, *_ = calls("dit")
    one = [Call((), {key: value[:1] for key, value in call.kwargs.items()}) for call in (second, third)]
    wanted = output(network.module, one[0])
    with caching_blocks(network, AT, partial(TableRule, ((1, DEPTH),), [None, 0, 0, None])) as spans:
        output(network.module, first)
        assert torch.equal(output(network.module, one[0]), wanted)
        output(network.module, one[1])
    assert [out for _, out in spans.decisions] == [None, None, 0], "what it then added is there at the next step"


def test_a_failure_leaves_nothing_behind() -> None:
    network = deep("dit")
    with caching_blocks(network, AT, partial(TableRule, ((1, DEPTH),), [None, 0, 0, None])):
        wanted = [output(network.module, call) for call in calls("dit")]
        output(network.module, calls("dit", 4)[0])
        with pytest.raises((IndexError, RuntimeError)):
            output(network.module, Call((), calls("dit", 4)[1].kwargs | {"class_labels": torch.tensor([10**6, 0])}))
        assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit"), wanted, strict=True))


class _Odd(Rule):
    """Leaves everything out at odd steps, by what the first attention reads."""

    watches = "modulated"

    def __init__(self, seen: list[Tensor]) -> None:
        self._seen = seen

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        return ((0, DEPTH),)

    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        assert seen is not None
        self._seen.append(seen)
        return 0 if step % 2 else None


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_may_see_what_the_first_unit_reads(name: str) -> None:
    network = deep(name)
    wanted = literal(network, calls(name), [None, 0, None, 0], ((0, DEPTH),))
    reads: list[Tensor] = []
    attention = next(part for part in network.module.modules() if hasattr(part, "to_q"))
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for call in calls(name):
        output(network.module, call)
    hook.remove()
    found, seen = ran(network), list[Tensor]()
    with caching_blocks(network, AT, lambda: _Odd(seen)):
        for row, (call, answer) in enumerate(zip(calls(name), wanted, strict=True)):
            found.clear()
            assert torch.equal(output(network.module, call), answer)
            assert set(found) == (set() if row % 2 else set(range(DEPTH)))
    assert all(torch.equal(a, b) for a, b in zip(seen, reads, strict=True))


def test_blocks_with_skips_between_them_are_refused() -> None:
    with pytest.raises(AerogelError, match="the unet family names no streams"):
        block_cache_state(opened("unet"), Trajectories.of(opened("unet"), calls("unet")))


def image_of(network: Network, streams: tuple[Tensor | None, ...]) -> Tensor:
    """The image's stream: the one that the first block of all gets from the patches."""
    found = dict(zip(GIVEN.get(network.family.name, ("hidden_states",)), streams, strict=True))["hidden_states"]
    assert found is not None
    return found


def ends_of(network: Network, given: Sequence[Call], last: int) -> list[Tensor]:
    """The image's stream before the first block and behind the one at this place, for each call."""
    blocks = list(network.blocks().values())
    ends: list[Tensor] = []
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: ends.append(image_of(network, taken(network, args, kwargs))), with_kwargs=True
        ),
        blocks[last].register_forward_hook(lambda _, __, made: ends.append(image_of(network, each(made)))),
    ]
    for call in given:
        output(network.module, call)
    for hook in hooks:
        hook.remove()
    return ends


@pytest.mark.parametrize("name", NAMES)
def test_residuals_are_those_of_all_blocks(name: str) -> None:
    network = deep(name)
    ends = ends_of(network, calls(name), -1)
    found = list(residuals(network, Trajectories.of(network, calls(name))))
    assert len(ends) == 2 * len(found) == 2 * len(STEPS)
    assert all(torch.equal(change, ends[2 * place + 1] - ends[2 * place]) for place, change in enumerate(found))
    with pytest.raises(AerogelError, match="7 recorded calls are not generations of 4 steps"):
        list(residuals(network, Trajectories.of(network, [*calls(name), *calls(name)[:3]])))


class _Watching(Rule):
    """Leaves nothing out and remembers what the first two blocks add to the image."""

    watches = "change"

    def __init__(self, seen: list[Tensor]) -> None:
        self._seen = seen

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        return ((2, DEPTH),)

    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        assert seen is not None
        self._seen.append(seen)
        return None


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_may_see_what_the_first_blocks_add_to_the_image(name: str) -> None:
    network, seen = deep(name), list[Tensor]()
    ends = ends_of(network, calls(name), 1)
    with caching_blocks(network, AT, lambda: _Watching(seen)):
        for call in calls(name):
            output(network.module, call)
    assert len(seen) == len(STEPS)
    assert all(torch.equal(change, ends[2 * place + 1] - ends[2 * place]) for place, change in enumerate(seen))
