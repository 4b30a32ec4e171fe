"""Block caching: a denoiser skips a range of blocks, and what the range added to the hidden states when it last ran is added again.

A block range is blocks first..last-1, one behind the other. Unlike module caching (schedule.py) it takes one cache entry however long it
is, and the blocks' norms and modulations do not run either. Compiled blocks run, or do not, as they are; only a rule that sees what the
first module reads has the first block run as it is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.model.calls import bytes_in
from aerogel.model.hooks import Stop, compiled, until
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.cache_dtype import CacheDtype, cache_format, versions
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.compiled import called, compiled_around, patch_compiled
from aerogel.runtime.feature_cache.streams import FeatureCacheState, StreamTracker, tracked

BlockRange = tuple[int, int]
"""The first block and the one behind the last."""
Parts = tuple[Tensor | None, ...]
"""Content of the streams between two blocks; image alone, or text and image."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockCacheState(FeatureCacheState):
    """The denoiser that a rule was made for; policies add what their rules need."""

    blocks: int
    """Blocks of the denoiser."""


class Rule(ABC):
    """Decides, step by step, whether a block range is left out; one is made for each guidance stream of each run."""

    watches: ClassVar[Literal["nothing", "modulated", "change"]] = "nothing"
    """Tensors that it sees of a forward before it decides: nothing; what the first module reads, behind norm and modulation; or what the
    blocks before its first block range add to the image's stream."""
    kept: Tensor | None = None
    """Memory of a forward."""

    @property
    @abstractmethod
    def ranges(self) -> tuple[BlockRange, ...]:
        """The block ranges it may leave out, one at a time."""

    @abstractmethod
    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        """Return the block range to skip at this step; None where all blocks run, as at the first step."""

    def needed_ranges(self, step: int) -> tuple[int, ...]:
        """The block ranges whose change may be added again behind this step, before all blocks run again."""
        return tuple(range(len(self.ranges)))


class TableRule(Rule):
    """Leaves out what a table says: for each step the number of a block range, or None."""

    def __init__(self, ranges: tuple[BlockRange, ...], table: Sequence[int | None]) -> None:
        self._ranges, self._table = ranges, table

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        """As given."""
        return self._ranges

    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        """Return the table's entry; nothing at the first step."""
        return self._table[step] if step else None

    def needed_ranges(self, step: int) -> tuple[int, ...]:
        """Return the block range to skip from the next step on until all blocks run."""
        later = takewhile(lambda out: out is not None, self._table[step + 1 :])
        return tuple({out for out in later if out is not None})


@dataclass
class _Memory:
    rule: Rule
    changes: dict[int, Any] = field(default_factory=dict)
    """Residual of each block range when it last ran, as it is stored."""
    versions: tuple[int, ...] = ()
    """Of what the rule remembers."""


class BlockCache(StreamTracker):
    """Follows the forwards of a denoiser and runs its blocks, or does not."""

    def __init__(self, network: Network, state: BlockCacheState, make: Callable[[], Rule], store: CacheDtype = "compute") -> None:
        super().__init__(state.steps, state.sampler, network.processor, state.precision)
        self._streams = hidden_states_of(network)
        self._image = _image_of(network)
        self._make, self._store = make, cache_format(store)
        self.decisions: list[tuple[int, int | None]] = []
        """(step, block range that was left out) of each forward."""
        self._stop = Stop()
        self.drop()

    def drop(self) -> None:
        """Let go of the forward at hand."""
        self._memory: _Memory | None = None
        self._row = 0
        self._out: int | None = None
        self._entries: dict[int, tuple[Parts, tuple[int, ...]]] = {}
        """Inputs of block ranges, and their versions."""

    def begin(self, row: int, memory: Any) -> None:
        """Set out with what the stream remembers, or with a new rule."""
        self._memory = memory or _Memory(self._make())
        self._row, self._out, self._entries = row, None, {}
        _require_same(self._memory.rule.kept, self._memory.versions)
        if self._memory.rule.watches == "nothing":
            self._decide(None)

    def end(self) -> Any:
        """Return the stream's memory."""
        memory = self._memory
        assert memory is not None, "begin() set it"
        self.decisions.append((self._row, self._out))
        wanted = memory.rule.needed_ranges(self._row)
        memory.changes = {number: change for number, change in memory.changes.items() if number in wanted}
        self.drop()
        return memory

    def held_bytes(self, memory: Any) -> int:
        """The bytes of what a stream remembers."""
        return bytes_in((memory.rule.kept, memory.changes))

    def block(self, place: int, own: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the block at this place."""
        memory = self._memory
        if memory is None:  # a block by itself, outside of the denoiser's forward
            return forward(*args, **kwargs)
        x = _read(own, self._streams, args, kwargs)
        for number, (first, _) in enumerate(memory.rule.ranges):
            if place == first or (place == 0 and memory.rule.watches == "change"):
                self._entries[number if place == first else -1] = (x, versions(x))
        made: Any = None
        with until(self._stop):
            if not self._left_out(place):
                made = forward(*args, **kwargs)
        if self._left_out(place):
            assert self._out is not None, "something is left out"
            ends = place + 1 == memory.rule.ranges[self._out][1]
            return _packed(_plus(x, self._store.unpack(memory.changes[self._out])) if ends else x)
        self._ran(memory, place, _unpacked(made))
        return made

    def modulated(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the first module's output; if it is skipped, its block ends here."""
        if self._memory is not None:
            self._decide(args[0] if args else kwargs["hidden_states"])
            if self._left_out(0):
                raise self._stop
        return forward(*args, **kwargs)

    def _ran(self, memory: _Memory, place: int, made: Parts) -> None:
        ranges = memory.rule.ranges
        if memory.rule.watches == "change" and place + 1 == ranges[0][0]:
            (change,) = _minus((made[self._image],), (self._entered(-1)[self._image],))
            self._decide(change)
        if self._out is None:
            for number, (_, last) in enumerate(ranges):
                if place + 1 == last and number in memory.rule.needed_ranges(self._row):
                    memory.changes[number] = self._store.pack(_minus(made, self._entered(number)))

    def _entered(self, number: int) -> Parts:
        """Return the input of a block range; -1 stands for the first block."""
        x, before = self._entries[number]
        _require_same(x, before)
        return x

    def _decide(self, seen: Tensor | None) -> None:
        assert self._memory is not None, "begin() set it"
        out = self._memory.rule.skipped_range(self._row, seen)
        self._out = out if out in self._memory.changes else None  # without what it added, a block range runs whatever the rule says
        self._memory.versions = versions(self._memory.rule.kept)

    def _left_out(self, place: int) -> bool:
        if self._out is None or self._memory is None:
            return False
        first, last = self._memory.rule.ranges[self._out]
        return first <= place < last


def hidden_states_of(network: Network) -> tuple[str, ...]:
    """The names of the streams that blocks read and give, in the order in which they give them.

    Raises AerogelError for a family whose blocks are no single row.
    """
    if not network.family.hidden_state_args:
        raise AerogelError(
            f"the {network.family.name} family names no streams that all blocks read and give (streams in aerogel/families); "
            "policies that leave out blocks need them, those that reuse modules (fora, harmonica) do not"
        )
    return network.family.hidden_state_args


def block_cache_state(network: Network, trajectories: Trajectories) -> BlockCacheState:
    """The state that every rule needs: steps and sampler of the recorded calls, and how many blocks there are."""
    hidden_states_of(network)
    steps, precision = trajectories.steps, trajectories.precision
    return BlockCacheState(steps=steps, sampler=trajectories.sampler, precision=precision, blocks=len(network.blocks()))


def residuals(network: Network, trajectories: Trajectories) -> Iterator[Tensor]:
    """Return what all blocks together add to the image's stream (B, N, D) in each step of the recorded generations.

    Raises AerogelError when the calls are not whole generations.
    """
    streams, image = hidden_states_of(network), _image_of(network)
    calls = [call for run in trajectories.runs for call in run.calls]
    blocks = list(network.blocks().values())
    seen: list[Tensor | None] = []
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda own, args, kwargs: seen.append(_read(own, streams, args, kwargs)[image]), with_kwargs=True
        ),
        blocks[-1].register_forward_hook(lambda own, args, made: seen.append(_unpacked(made)[image])),
    ]
    try:
        for call in calls:
            seen.clear()
            network.run(call)
            (change,) = _minus((seen[1],), (seen[0],))
            assert change is not None, "the image's stream is never missing"
            yield change
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def caching_blocks(
    network: Network, state: BlockCacheState, make: Callable[[], Rule], store: CacheDtype = "compute"
) -> Iterator[BlockCache]:
    """Leave block ranges out by a rule for a while, at the steps that `block_cache_state` found; then the denoiser is what it was.

    Raises AerogelError when the state is of a network with more or fewer blocks, and where blocks are compiled with what holds them.
    """
    blocks = list(network.blocks().values())
    if state.blocks != len(blocks):
        raise AerogelError(f"the policy was made for {state.blocks} blocks, this denoiser has {len(blocks)}")
    if together := [around for around in compiled_around(network.module, network.blocks()) if around not in blocks]:
        raise AerogelError(
            f"{type(together[0]).__name__} is compiled with the blocks in it, which cannot be left out then: compile each block"
        )
    spans = BlockCache(network, state, make, store)
    answers: dict[nn.Module, Callable[..., Any]] = {
        block: partial(spans.block, place, block, called(block)) for place, block in enumerate(blocks)
    }
    if make().watches == "modulated":
        first = network.module.get_submodule(next(iter(cached_modules_of(network))))
        answers[first] = partial(spans.modulated, called(first))
        if compiled(blocks[0]):  # compiled code cannot be given up half-way
            answers[blocks[0]] = partial(spans.block, 0, blocks[0], blocks[0]._call_impl)
    with patch_compiled(network.module, answers), tracked(network.module, spans):
        yield spans


def _image_of(network: Network) -> int:
    """The place of the image's stream among the streams."""
    return hidden_states_of(network).index(network.family.image_stream)


def _require_same(kept: Any, before: tuple[int, ...]) -> None:
    """Refuse what was changed in place since."""
    if versions(kept) != before:
        raise AerogelError(
            "what goes into a block was changed in place after it was kept, so it cannot be compared any more: a block writes into its "
            "input (such as x += y, or a hook); write into a new tensor there"
        )


def _read(block: nn.Module, streams: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Parts:
    names = arguments_of(block)
    return tuple(kwargs[name] if name in kwargs else args[names.index(name)] for name in streams)


def _unpacked(made: Any) -> Parts:
    return made if isinstance(made, tuple) else (made,)


def _packed(parts: Parts) -> Any:
    return parts if len(parts) > 1 else parts[0]


def _minus(after: Parts, before: Parts) -> Parts:
    return tuple(None if a is None or b is None else a - b for a, b in zip(after, before, strict=True))


def _plus(x: Parts, change: Parts) -> Parts:
    return tuple(None if a is None or b is None else a + b for a, b in zip(x, change, strict=True))
