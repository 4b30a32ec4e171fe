"""Denoisers that give again what a unit gave at an earlier step instead of running it: a static table says when, slots hold what.

T steps, N units.
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
from aerogel.runtime.feature_cache.compiled import by_pattern, called, compiled_around, standing_in
from aerogel.runtime.feature_cache.stored import CacheDtype, store_named, versions
from aerogel.runtime.feature_cache.streams import Following, followed, sampler_of, steps_in
from aerogel.runtime.feature_cache.units import units_of


@dataclass(frozen=True)
class Schedule:
    """When which unit runs."""

    steps: tuple[float, ...]
    """The sampler's time steps, in order."""
    sampler: str
    units: tuple[str, ...]
    computed_TN: Tensor
    """True where the unit runs, False where it gives what it gave last."""

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.units))
        if tuple(self.computed_TN.shape) != shape:
            raise AerogelError(f"a schedule of {shape[0]} steps and {shape[1]} units has a table of {tuple(self.computed_TN.shape)}")

    @property
    def reused(self) -> float:
        """Share of the slots (steps x units) that are not computed: the cache usage ratio of the papers."""
        return 1 - float(self.computed_TN.float().mean())

    def as_state(self) -> dict[str, Any]:
        """What a policy keeps of it: the table as a line of 1 (runs) and 0 a step, for anybody to read."""
        computed = ["".join("1" if one else "0" for one in row) for row in self.computed_TN.tolist()]
        return {"steps": list(self.steps), "sampler": self.sampler, "units": list(self.units), "computed": computed}

    @classmethod
    def of(cls, network: Network, state: Mapping[str, Any]) -> Schedule:
        """Read a state; raises AerogelError when it is of other units than the network's."""
        ours, units = tuple(units_of(network)), tuple(state["units"])
        if units != ours:
            other = next((name for name in units if name not in ours), None) or next(name for name in ours if name not in units)
            raise AerogelError(f"the schedule is of {len(units)} units, this denoiser has {len(ours)}; {other} is in one of them only")
        computed_TN = torch.tensor([[one == "1" for one in row] for row in state["computed"]])
        return cls(tuple(state["steps"]), state["sampler"], units, computed_TN)


def scheduled(network: Network, calls: Sequence[Call], decide: Callable[[int, int], Tensor]) -> dict[str, Any]:
    """The state of a schedule for the steps of recorded calls; `decide` gets T and N and says which units compute (T, N)."""
    units, steps = tuple(units_of(network)), steps_in(network, calls)
    return Schedule(steps, sampler_of(network), units, decide(len(steps), len(units))).as_state()


class Slot:
    """Stands in for a unit's forward: runs it, or gives what it kept.

    A compiled block holds `traced` alone, which reads whether the unit runs and, if not, what it gives. `open` and `close`, with `give` and
    `keep` in them, run before and after the block then, so that what is kept and how is never traced.
    """

    remembers: ClassVar[bool] = False
    """Whether what it keeps is of use at the unit's own next run too, so that it stays until the unit is reused no more."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.computes, self.keeps = True, False
        self.row = 0
        """The step at hand."""
        self.given: Any = None
        """What the unit gives at this step, while its block runs."""
        self.store = store_named("compute")
        """How the value is put away."""
        self._value: Any = None
        self.versions: tuple[int, ...] = ()
        """Of the tensors in the value, when it was kept."""

    @property
    def value(self) -> Any:
        """What it keeps."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value, self.versions = value, versions(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the unit gives at this step."""
        self.open()
        made = self.traced(*args, **kwargs)
        self.close()
        return made

    def open(self) -> None:
        """Before the unit: have at hand what it gives if it does not run."""
        if not self.computes:
            stored = self.value
            self.value = self.store.unpack(stored)
            self.given, kept = self.give()
            self.value = stored if kept is self.value else self.store.pack(kept)

    def traced(self, *args: Any, **kwargs: Any) -> Any:
        """Run the unit, or do not: what a compiled block contains."""
        if self.computes:
            self.given = self.own(*args, **kwargs)
        return self.given

    def close(self) -> None:
        """After the unit: keep of its output what later steps want."""
        if not self.keeps:
            self.value = None
        elif self.computes:
            self.value = self.store.pack(self.keep(self.given))
        self.given = None

    def keep(self, made: Any) -> Any:
        """What the slot holds of an output that was just computed."""
        return made

    def give(self) -> tuple[Any, Any]:
        """The output out of the slot, and what it holds from now on."""
        return self.value, self.value


class SkippedNorm:
    """Stands in for the forward of what only units read, such as a norm: where none of them runs, it passes no tokens on."""

    def __init__(self, own: Callable[..., Tensor], readers: Sequence[Slot]) -> None:
        self.own, self.readers = own, readers

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run, or do not."""
        if any(slot.computes for slot in self.readers):
            return self.own(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return x[:, :0]


class Reuse(Following):
    """Follows the forwards of a denoiser and tells its slots what to do."""

    def __init__(self, schedule: Schedule, slots: Mapping[str, Slot], pipeline: Any = None) -> None:
        super().__init__(schedule.steps, schedule.sampler, pipeline)
        self.schedule, self.slots = schedule, slots
        self.computed = 0
        """Units that ran since it was put on."""
        self._rows = schedule.computed_TN.tolist()

    def begin(self, row: int, memory: Any) -> None:
        """Set the slots."""
        held: Mapping[str, Any] = memory or {}
        for place, (name, slot) in enumerate(self.slots.items()):
            slot.value, before = held.get(name, (None, ()))
            if slot.versions != before:
                raise AerogelError(
                    f"what {name} gave was changed in place after it was kept for later steps: something behind it writes into its output "
                    "(such as x += y, or a hook); write into a new tensor there, or keep copies with cache_dtype: float8"
                )
            slot.computes = self._rows[row][place] or slot.value is None
            later = self._rows[row + 1 :] if slot.remembers else self._rows[row + 1 : row + 2]
            slot.keeps, slot.row = any(not one[place] for one in later), row
            self.computed += slot.computes

    def end(self) -> dict[str, Any]:
        """What the slots hold, and the versions of it."""
        held = {name: (slot.value, slot.versions) for name, slot in self.slots.items() if slot.value is not None}
        self.drop()
        return held

    def drop(self) -> None:
        """Empty the slots."""
        for slot in self.slots.values():
            slot.value = slot.given = None


class _Around:
    """Stands in front of what was compiled of a block: opens and closes the slots inside, which the compiled block does not."""

    def __init__(self, block: nn.Module, slots: Sequence[Slot]) -> None:
        self._block, self._own, self._slots = block, called(block), slots

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        for slot in self._slots:
            slot.open()
        with by_pattern(self._block, [slot.computes for slot in self._slots]):
            made = self._own(*args, **kwargs)
        for slot in self._slots:
            slot.close()
        return made


Kind = TypeVar("Kind", bound=Slot)


def stand_ins(network: Network, make: Callable[[Callable[..., Any]], Kind]) -> tuple[dict[str, Kind], dict[nn.Module, Callable[..., Any]]]:
    """A slot for each unit by full name, and what answers for which module: slots for units, and for what only units read."""
    units, find = units_of(network), network.module.get_submodule
    slots = {name: make(find(name).forward) for name in units}
    answers: dict[nn.Module, Callable[..., Any]] = {find(name): slot.__call__ for name, slot in slots.items()}
    readers: dict[str, list[Slot]] = {}
    for name, unit in units.items():
        for read in (*unit.norms, *unit.parts):
            readers.setdefault(read, []).append(slots[name])
    return slots, answers | {find(name): SkippedNorm(find(name).forward, those).__call__ for name, those in readers.items()}


@contextmanager
def in_place(denoiser: nn.Module, slots: Mapping[str, Slot], answers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Put stand-ins on a denoiser for a while.

    Raises AerogelError where it is compiled as a whole, and where blocks are compiled around slots that have a way of their own to run.
    """
    every, find = dict(answers), denoiser.get_submodule
    for module, names in compiled_around(denoiser, slots).items():
        if find(names[0]) is module:
            slots[names[0]].own = called(module)
            continue
        inside = [slots[name] for name in names]
        if any(type(slot).__call__ is not Slot.__call__ for slot in inside):
            raise AerogelError("this policy runs parts of units, which compiled blocks cannot: leave the blocks uncompiled for it")
        every |= {find(name): slots[name].traced for name in names}
        every[module] = _Around(module, inside)
    with standing_in(denoiser, every):
        yield


@contextmanager
def reusing(
    network: Network, schedule: Schedule, make: Callable[[Callable[..., Any]], Slot] = Slot, store: CacheDtype = "compute"
) -> Iterator[Reuse]:
    """Put a schedule on the denoiser for a while; afterwards it is what it was.

    Raises AerogelError for a denoiser that is compiled as a whole, and for slots in float8 that reckon with what they kept.
    """
    slots, answers = stand_ins(network, make)
    _put_away(slots.values(), store)
    reuse = Reuse(schedule, slots, network.processor)
    with in_place(network.module, slots, answers), followed(network.module, reuse):
        yield reuse


def _put_away(slots: Iterable[Slot], store: CacheDtype) -> None:
    for slot in slots:
        slot.store = store_named(store)
        if slot.remembers and store != "compute":
            raise AerogelError(
                f"slots in {store} hold outputs to 4 bits, and this policy reckons with how they change, which is less than that: "
                "keep them as they are computed (slots: compute)"
            )


def slot_sizes(network: Network, call: Call, store: CacheDtype = "compute") -> tuple[int, ...]:
    """The bytes that each unit's slot holds of a forward."""
    slots, answers = stand_ins(network, Slot)
    for slot in slots.values():
        slot.keeps, slot.store = True, store_named(store)
    with in_place(network.module, slots, answers):
        network.run(call)
    return tuple(bytes_in(slot.value) for slot in slots.values())


def slot_bytes(schedule: Schedule, unit_bytes: Sequence[int]) -> int:
    """The most that the slots of one stream hold between two steps, for slots of these sizes; 0 where nothing is reused."""
    reused_TN = ~schedule.computed_TN[1:]
    held_T = (reused_TN * torch.tensor(unit_bytes)).sum(-1)
    return int(held_T.max()) if len(held_T) else 0
