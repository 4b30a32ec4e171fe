"""Module caching: a denoiser returns the cached output of a module instead of running it; a static schedule says when.

T steps, N modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, bytes_in
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories, has_step_by_token
from aerogel.runtime.feature_cache.cache_dtype import CacheDtype, cache_format, versions
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.compiled import by_pattern, called, compiled_around, patch_compiled
from aerogel.runtime.feature_cache.streams import FeatureCacheState, StreamTracker, tracked


@dataclass(frozen=True, eq=False, kw_only=True)
class ScheduleState(FeatureCacheState):
    """A schedule as policies keep it, and what it saves of one sample: two forwards with guidance."""

    modules: tuple[str, ...]
    """Full names of the cached modules."""
    computed: tuple[str, ...]
    """For each step a line with a 1 for each module that runs and a 0 for each that is reused."""
    macs: float | None = None
    """Multiply-accumulates of a forward; None where a policy does more than reuse, for this and the next two."""
    macs_saved: float | None = None
    """Share of a whole run's multiply-accumulates that is skipped."""
    cache_bytes: int | None = None
    """Most bytes that are held between two steps."""

    def __post_init__(self) -> None:
        """Raise AerogelError unless the table has a line for each step and a 0 or 1 for each module."""
        if len(self.computed) != len(self.steps) or any(len(row) != len(self.modules) or set(row) - set("01") for row in self.computed):
            raise AerogelError(
                f"a schedule of {len(self.steps)} steps and {len(self.modules)} modules has another table; calibrate the policy anew"
            )


@dataclass(frozen=True)
class Schedule:
    """Steps at which each module runs."""

    steps: tuple[float, ...]
    """The sampler's time steps, in order."""
    sampler: str
    modules: tuple[str, ...]
    computed_TN: Tensor
    """True where the module runs, False where it gives what it gave last."""
    precision: float | None = None
    """Relative precision of the steps; None for whole numbers."""

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.modules))
        if tuple(self.computed_TN.shape) != shape:
            raise AerogelError(f"a schedule of {shape[0]} steps and {shape[1]} modules has a table of {tuple(self.computed_TN.shape)}")

    @property
    def reused(self) -> float:
        """Share of the entries (steps x modules) that are not computed: the cache usage ratio of the papers."""
        return 1 - float(self.computed_TN.float().mean())

    def as_state(self) -> ScheduleState:
        """Return what a policy keeps of it."""
        computed = rows_of(self.computed_TN)
        return ScheduleState(steps=self.steps, sampler=self.sampler, precision=self.precision, modules=self.modules, computed=computed)

    @classmethod
    def of(cls, network: Network, state: ScheduleState) -> Schedule:
        """Read a state; raises AerogelError when it is of other modules than the network's."""
        ours, modules = tuple(cached_modules_of(network)), state.modules
        if modules != ours:
            other = next((name for name in modules if name not in ours), None) or next(name for name in ours if name not in modules)
            raise AerogelError(f"the schedule is of {len(modules)} modules, this denoiser has {len(ours)}; {other} is in one of them only")
        computed_TN = torch.tensor([[one == "1" for one in row] for row in state.computed])
        return cls(state.steps, state.sampler, modules, computed_TN, state.precision)


def rows_of(computed_TN: Tensor) -> tuple[str, ...]:
    """Return the table as a line of 1 (runs) and 0 (reused) a step, for anybody to read."""
    return tuple("".join("1" if one else "0" for one in row) for row in computed_TN.tolist())


def schedule_state(network: Network, trajectories: Trajectories, decide: Callable[[int, int], Tensor]) -> ScheduleState:
    """The state of a schedule for the steps of recorded calls; `decide` gets T and N and says which modules compute (T, N)."""
    modules, steps = tuple(cached_modules_of(network)), trajectories.steps
    return Schedule(steps, trajectories.sampler, modules, decide(len(steps), len(modules)), trajectories.precision).as_state()


class CacheEntry:
    """Stands in for a module's forward: runs it, or gives what it kept.

    A compiled block holds `traced` alone, which reads whether the module runs and, if not, what it returns. `open` and `close`, with `give`
    and `keep` in them, run before and after the block then, so that what is kept and how is never traced.
    """

    remembers: ClassVar[bool] = False
    """True where what it keeps serves the module's own next run too, so that it stays until the module is reused no more."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.computes, self.keeps = True, False
        self.per_token = False
        """True where each token has a time step of its own at this step."""
        self.row = 0
        """The step at hand."""
        self.given: Any = None
        """Output of the module at this step, while its block runs."""
        self.store = cache_format("compute")
        """Storage of the value."""
        self._value: Any = None
        self.versions: tuple[int, ...] = ()
        """Of the tensors in the value, when it was kept."""

    @property
    def value(self) -> Any:
        """Cached value."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value, self.versions = value, versions(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output at this step."""
        self.open()
        made = self.traced(*args, **kwargs)
        self.close()
        return made

    def open(self) -> None:
        """Before the module: have at hand what it gives if it does not run."""
        if not self.computes:
            stored = self.value
            self.value = self.store.unpack(stored)
            self.given, kept = self.give()
            self.value = stored if kept is self.value else self.store.pack(kept)

    def traced(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or do not: what a compiled block contains."""
        if self.computes:
            self.given = self.own(*args, **kwargs)
        return self.given

    def close(self) -> None:
        """After the module: keep of its output what later steps want."""
        if not self.keeps:
            self.value = None
        elif self.computes:
            self.value = self.store.pack(self.keep(self.given))
        self.given = None

    def keep(self, made: Any) -> Any:
        """Return what the cache entry keeps of an output that was just computed."""
        return made

    def give(self) -> tuple[Any, Any]:
        """The output out of the cache entry, and what it holds from now on."""
        return self.value, self.value


class SkippedNorm:
    """Stands in for the forward of what only modules read, such as a norm: where none of them runs, it passes no tokens on."""

    def __init__(self, own: Callable[..., Tensor], readers: Sequence[CacheEntry]) -> None:
        self.own, self.readers = own, readers

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run, or do not."""
        if any(entry.computes for entry in self.readers):
            return self.own(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        # A modulation by token needs as many tokens as it has rows, even if nobody reads what comes out.
        return x if any(entry.per_token for entry in self.readers) else x[:, :0]


class ModuleCache(StreamTracker):
    """Follows the forwards of a denoiser and tells its cache entries what to do."""

    def __init__(self, schedule: Schedule, entries: Mapping[str, CacheEntry], pipeline: Any = None) -> None:
        super().__init__(schedule.steps, schedule.sampler, pipeline, schedule.precision)
        self.schedule, self.entries = schedule, entries
        self.computed = 0
        """Modules that ran since it was put on."""
        self._rows = schedule.computed_TN.tolist()

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: see whether tokens have time steps of their own."""
        made = super().start(denoiser, args, kwargs)
        per_token = has_step_by_token(denoiser, args, kwargs)
        for entry in self.entries.values():
            entry.per_token = per_token
        return made

    def begin(self, row: int, memory: Any) -> None:
        """Set the cache entries."""
        held: Mapping[str, Any] = memory or {}
        for place, (name, entry) in enumerate(self.entries.items()):
            entry.value, before = held.get(name, (None, ()))
            if entry.versions != before:
                raise AerogelError(
                    f"what {name} gave was changed in place after it was kept for later steps: something behind it writes into its output "
                    "(such as x += y, or a hook); write into a new tensor there, or keep copies with cache_dtype: float8"
                )
            entry.computes = self._rows[row][place] or entry.value is None
            later = self._rows[row + 1 :] if entry.remembers else self._rows[row + 1 : row + 2]
            entry.keeps, entry.row = any(not one[place] for one in later), row
            self.computed += entry.computes

    def end(self) -> dict[str, Any]:
        """Return the content of the cache entries, and its versions."""
        held = {name: (entry.value, entry.versions) for name, entry in self.entries.items() if entry.value is not None}
        self.drop()
        return held

    def drop(self) -> None:
        """Empty the cache entries."""
        for entry in self.entries.values():
            entry.value = entry.given = None


class _Around:
    """Stands in front of what was compiled of a block: opens and closes the cache entries inside, which the compiled block does not."""

    def __init__(self, block: nn.Module, entries: Sequence[CacheEntry]) -> None:
        self._block, self._own, self._slots = block, called(block), entries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output."""
        for entry in self._slots:
            entry.open()
        with by_pattern(self._block, [entry.computes for entry in self._slots]):
            made = self._own(*args, **kwargs)
        for entry in self._slots:
            entry.close()
        return made


Kind = TypeVar("Kind", bound=CacheEntry)


def make_entries(
    network: Network, make: Callable[[Callable[..., Any]], Kind]
) -> tuple[dict[str, Kind], dict[nn.Module, Callable[..., Any]]]:
    """Make a cache entry for each cached module by full name, and the forwards that take the place of theirs and of their norms'."""
    modules, find = cached_modules_of(network), network.module.get_submodule
    entries = {name: make(find(name).forward) for name in modules}
    answers: dict[nn.Module, Callable[..., Any]] = {find(name): entry.__call__ for name, entry in entries.items()}
    readers: dict[str, list[CacheEntry]] = {}
    for name, module in modules.items():
        for read in (*module.norms, *module.parts):
            readers.setdefault(read, []).append(entries[name])
    return entries, answers | {find(name): SkippedNorm(find(name).forward, those).__call__ for name, those in readers.items()}


@contextmanager
def patched_entries(
    denoiser: nn.Module, entries: Mapping[str, CacheEntry], answers: Mapping[nn.Module, Callable[..., Any]]
) -> Iterator[None]:
    """Put stand-ins on a denoiser for a while.

    Raises AerogelError where it is compiled as a whole, and where blocks are compiled around entries that run in a way of their own.
    """
    every, find = dict(answers), denoiser.get_submodule
    for module, names in compiled_around(denoiser, entries).items():
        if find(names[0]) is module:
            entries[names[0]].own = called(module)
            continue
        inside = [entries[name] for name in names]
        if any(type(entry).__call__ is not CacheEntry.__call__ for entry in inside):
            raise AerogelError("this policy runs parts of modules, which compiled blocks cannot: leave the blocks uncompiled for it")
        every |= {find(name): entries[name].traced for name in names}
        every[module] = _Around(module, inside)
    with patch_compiled(denoiser, every):
        yield


@contextmanager
def caching(
    network: Network, schedule: Schedule, make: Callable[[Callable[..., Any]], CacheEntry] = CacheEntry, store: CacheDtype = "compute"
) -> Iterator[ModuleCache]:
    """Put a schedule on the denoiser for a while; afterwards it is what it was.

    Raises AerogelError for a denoiser that is compiled as a whole, and for cache entries in float8 that reckon with what they kept.
    """
    entries, answers = make_entries(network, make)
    _put_away(entries.values(), store)
    reuse = ModuleCache(schedule, entries, network.processor)
    with patched_entries(network.module, entries, answers), tracked(network.module, reuse):
        yield reuse


def _put_away(entries: Iterable[CacheEntry], store: CacheDtype) -> None:
    for entry in entries:
        entry.store = cache_format(store)
        if entry.remembers and store != "compute":
            raise AerogelError(
                f"cache entries in {store} hold outputs to 4 bits, and this policy reckons with how they change, which is less than that: "
                "keep them as they are computed (cache_dtype: compute)"
            )


def entry_sizes(network: Network, call: Call, store: CacheDtype = "compute") -> tuple[int, ...]:
    """The bytes that each module's cache entry holds of a forward."""
    entries, answers = make_entries(network, CacheEntry)
    for entry in entries.values():
        entry.keeps, entry.store = True, cache_format(store)
    with patched_entries(network.module, entries, answers):
        network.run(call)
    return tuple(bytes_in(entry.value) for entry in entries.values())


def cache_bytes(schedule: Schedule, module_bytes: Sequence[int]) -> int:
    """The most that the cache entries of one stream hold between two steps, for cache entries of these sizes; 0 where nothing is reused."""
    reused_TN = ~schedule.computed_TN[1:]
    held_T = (reused_TN * torch.tensor(module_bytes)).sum(-1)
    return int(held_T.max()) if len(held_T) else 0
