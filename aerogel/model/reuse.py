"""Denoisers that give again what a unit gave at an earlier step instead of running it: a static table says when, slots hold what.

T steps, N units. A step is one call of the denoiser in a guidance stream. Steps are counted, and each is checked against the time step it
ought to have. Streams (the branches of guidance that come in calls of their own) never see each other's slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, tensors_in
from aerogel.model.clock import in_use, timestep_of
from aerogel.model.hooks import answering
from aerogel.model.network import Network
from aerogel.model.units import units_of

_BRANCH = "branch {}"
_CONTEXT = "cache_context"
"""The method by which diffusers' pipelines name the branch of guidance that comes next."""


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


def sampler_of(network: Network) -> str:
    """What the pipeline's sampler is called; empty without a pipeline."""
    scheduler = getattr(network.processor, "scheduler", None)
    return "" if scheduler is None else type(scheduler).__name__


def steps_in(network: Network, calls: Sequence[Call]) -> tuple[float, ...]:
    """The time steps of the first recorded generation, in order; branches of guidance in calls of their own count once."""
    steps = [step_of(network.module, call.args, call.kwargs) for call in calls]
    if not steps:
        raise AerogelError("no recorded calls: give samples, or a pipeline that they can be recorded from")
    again = next((place for place in range(1, len(steps)) if steps[place] == steps[0] != steps[place - 1]), len(steps))
    return tuple(step for step, before in zip(steps[:again], [None, *steps], strict=False) if step != before)


class Slot:
    """Stands in for a unit's forward: runs it, or gives what it kept; flags are set before each step, for compiled blocks to read."""

    remembers: ClassVar[bool] = False
    """Whether what it keeps is of use at the unit's own next run too, so that it stays until the unit is reused no more."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.computes, self.keeps = True, False
        self.row = 0
        """The step at hand."""
        self.value: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the unit gives at this step."""
        if not self.computes:
            made, kept = self.give()
        else:
            made = self.own(*args, **kwargs)
            kept = self.keep(made)
        self.value = kept if self.keeps else None
        return made

    def keep(self, made: Any) -> Any:
        """What the slot holds of an output that was just computed."""
        return made

    def give(self) -> tuple[Any, Any]:
        """The output out of the slot, and what it holds from now on."""
        return self.value, self.value


class Unread:
    """Stands in for the forward of a norm that only a unit reads: where the unit does not run, it passes no tokens on."""

    def __init__(self, own: Callable[..., Tensor], slot: Slot) -> None:
        self.own, self.slot = own, slot

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise, or do not."""
        return self.own(x, *args, **kwargs) if self.slot.computes else x[:, :0]


class Reuse:
    """Follows the forwards of a denoiser and tells its slots what to do."""

    def __init__(self, schedule: Schedule, slots: Mapping[str, Slot], pipeline: Any = None) -> None:
        self.schedule, self.slots, self._pipeline = schedule, slots, pipeline
        self.forwards, self.computed = 0, 0
        """Forwards of the denoiser, and units that ran in them, since it was put on."""
        self.peak_bytes = 0
        """The most that the slots held between two forwards."""
        self._rows = schedule.computed_TN.tolist()
        self._timesteps: Any = None
        """The list of the run at hand, which a pipeline's sampler makes anew for each."""
        self._named: str | None = None
        self._stream = ""
        self._last: tuple[float, int] | None = None
        self._next: dict[str, int] = {}
        self._held: dict[str, dict[str, Any]] = {}
        self._shape: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget everything that was kept: the next forward begins a run."""
        self._next.clear()
        self._held.clear()
        self._shape.clear()
        self._last = None
        for slot in self.slots.values():
            slot.value = None

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: find the stream and the step, and set the slots."""
        step = step_of(denoiser, args, kwargs)
        timesteps = getattr(getattr(self._pipeline, "scheduler", None), "timesteps", None)
        if timesteps is not self._timesteps:  # also where the last run was given up
            self.reset()
            self._timesteps = timesteps
        self._stream = self._named or self._branch(step)
        row = self._place(step)
        first = tensors_in((args, kwargs))[0]
        like = (first.shape, first.dtype, first.device)
        if self._shape.get(self._stream) != like:  # what was kept fits no more
            self._held.pop(self._stream, None)
        self._shape[self._stream] = like
        held = self._held.pop(self._stream, {})
        for place, (name, slot) in enumerate(self.slots.items()):
            slot.value = held.get(name)
            slot.computes = self._rows[row][place] or slot.value is None
            later = self._rows[row + 1 :] if slot.remembers else self._rows[row + 1 : row + 2]
            slot.keeps, slot.row = any(not one[place] for one in later), row
            self.computed += slot.computes
        self._next[self._stream] = row + 1
        self.forwards += 1

    def stop(self, _: nn.Module, __: Any, output: Any) -> None:
        """After a forward: put the stream's slots away; after one that failed, forget all."""
        if output is None:
            self.reset()
            return
        self._held[self._stream] = {name: slot.value for name, slot in self.slots.items() if slot.value is not None}
        for slot in self.slots.values():
            slot.value = None
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for tensor in tensors_in(self._held)))

    def _branch(self, step: float) -> str:
        """The stream of a forward of which no pipeline says whose it is: calls of one step in a row are the branches of guidance."""
        branch = 0
        if self._last is not None and self._last[0] == step and not self._expects(_BRANCH.format(0), step):
            branch = self._last[1] + 1
        self._last = (step, branch)
        return _BRANCH.format(branch)

    def _expects(self, stream: str, step: float) -> bool:
        row = self._next.get(stream, 0)
        return row < len(self.schedule.steps) and self.schedule.steps[row] == step

    def _place(self, step: float) -> int:
        """The row of the schedule that this forward has; a first step begins a new run."""
        row, steps = self._next.get(self._stream, 0), self.schedule.steps
        if self._expects(self._stream, step):
            return row
        if step == steps[0]:
            self._held.pop(self._stream, None)
            return 0
        row %= len(steps)
        raise AerogelError(
            f"time step {step:g}{in_use(self._pipeline)} is not the {steps[row]:g} that comes at step {row + 1} of the {len(steps)} of "
            f"{self.schedule.sampler or 'the sampler'} ({steps[0]:g} to {steps[-1]:g}) that this cache was made for; "
            "use that sampler with that many steps, or make another cache"
        )


Kind = TypeVar("Kind", bound=Slot)


def stand_ins(network: Network, make: Callable[[Callable[..., Any]], Kind]) -> tuple[dict[str, Kind], dict[nn.Module, Callable[..., Any]]]:
    """A slot for each unit by full name, and what answers for which module: slots for units, and for norms that only units read."""
    units, find = units_of(network), network.module.get_submodule
    slots = {name: make(find(name).forward) for name in units}
    answers: dict[nn.Module, Callable[..., Any]] = {find(name): slot for name, slot in slots.items()}
    for name, unit in units.items():
        answers |= {norm: Unread(norm.forward, slots[name]) for norm in map(find, unit.norms)}
    return slots, answers


@contextmanager
def reusing(network: Network, schedule: Schedule, make: Callable[[Callable[..., Any]], Slot] = Slot) -> Iterator[Reuse]:
    """Put a schedule on the denoiser for a while; afterwards it is what it was."""
    denoiser, (slots, answers) = network.module, stand_ins(network, make)
    reuse = Reuse(schedule, slots, network.processor)
    hooks = [
        denoiser.register_forward_pre_hook(reuse.start, with_kwargs=True),
        denoiser.register_forward_hook(reuse.stop, always_call=True),
    ]
    try:
        with answering(answers), _named_streams(denoiser, reuse):
            yield reuse
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _named_streams(denoiser: nn.Module, reuse: Reuse) -> Iterator[None]:
    """Hear which branch of guidance a pipeline says that it runs, where its denoiser can be told."""
    own = getattr(denoiser, _CONTEXT, None)
    if own is None:
        yield
        return

    @contextmanager
    def told(name: str, **kwargs: Any) -> Iterator[None]:
        before, reuse._named = reuse._named, name
        try:
            with own(name, **kwargs):
                yield
        finally:
            reuse._named = before

    before = denoiser.__dict__.get(_CONTEXT)
    denoiser.__dict__[_CONTEXT] = told
    try:
        yield
    finally:
        denoiser.__dict__.pop(_CONTEXT)
        if before is not None:
            denoiser.__dict__[_CONTEXT] = before


def slot_bytes(schedule: Schedule, unit_bytes: Sequence[int]) -> int:
    """The most that the slots of one stream hold between two steps, for outputs of these sizes; 0 where nothing is reused."""
    reused_TN = ~schedule.computed_TN[1:]
    held_T = (reused_TN * torch.tensor(unit_bytes)).sum(-1)
    return int(held_T.max()) if len(held_T) else 0


def step_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The time step of a forward; raises AerogelError where its samples are at several."""
    timestep = timestep_of(denoiser, args, kwargs)
    found = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
    if len(found) != 1:
        raise AerogelError(f"a forward over {len(found)} different time steps: a cache needs all samples at one step")
    return float(found.pop())
