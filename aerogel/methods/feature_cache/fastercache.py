"""FasterCache: self-attention follows its last change, and guidance's unconditional branch is made of the other (arXiv:2410.19355).

T steps, N modules; H height and W width of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Requirement
from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call, map_tensors
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories, latent_of
from aerogel.options import Count
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.guidance import CFGBatch, Half, HalfBatchEntry, UncondPredictor, guided, require_pair
from aerogel.runtime.feature_cache.replay import replays, sampler_of
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState, caching, schedule_state
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class FastercacheState(ScheduleState):
    """A schedule of self-attention, and that of guidance's unconditional half."""

    both: str
    """A 1 for each step at which both halves run, a 0 for each at which the conditional one runs alone."""
    conditional: Literal["first", "second", ""]
    """Half of the batch that has the condition; empty where both always run."""


@dataclass(frozen=True)
class Fastercache(SchedulePolicy[FastercacheState]):
    """Extrapolates self-attention outputs, and predicts the unconditional branch of guidance from the conditional one, at some steps."""

    state: ClassVar[type[PolicyState]] = FastercacheState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "cached_modules", "cfg", "uncached"})
    search_space: ClassVar[SearchSpace | None] = ("unconditional_every", (2, 3, 4, 5, 6, 8, 10))

    self_every: Count = 2
    """Within its window self-attention runs at the steps that this divides."""
    window: tuple[float, float] = (-1.0, 681.0)
    """Time steps above the first and below the second are within it."""
    weight_first: float = 0.5
    """Weight of the change between its last two outputs where it is left out first (published: 0.5, or rising from 0)."""
    weight_last: float = 0.5
    """And where it is left out last; linear in between (published: 0.5, or rising to 1)."""
    unconditional_every: Count = 5
    """Within its window the unconditional half of the batch runs at the steps that this divides; 1 leaves out attention only."""
    unconditional_window: tuple[float, float] = (-1.0, 641.0)
    """Time steps between which the unconditional half may be left out."""
    low: float = 1.1
    """Factor of the low frequencies of the halves' difference at each step that leaves one out."""
    low_window: tuple[float, float] = (99.0, 901.0)
    """Time steps between which they are."""
    high: float = 1.1
    """And the high frequencies."""
    high_window: tuple[float, float] = (-1.0, 301.0)
    """Time steps between which they are."""
    conditional: Literal["found", "first", "second"] = "found"
    """Half of the batch that has the condition; `found` replays a recorded generation, which shows it."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> FastercacheState:
        """Read the sampler's steps and the order of the halves off the calls.

        Raises AerogelError where guidance does not come in one batch of images or clips.
        """
        trajectories = Trajectories.of(network, calls)
        modules, steps = cached_modules_of(network), trajectories.thousandths
        conditional: Half | Literal[""] = self._conditional(network, trajectories) if self.unconditional_every > 1 else ""
        both_T = both_run(steps, self.unconditional_every, self.unconditional_window)
        runs_T = torch.tensor(attention_runs(steps, both_T, self.self_every, self.window))
        attends_N = torch.tensor([module.kind == "self-attention" for module in modules.values()])
        state = schedule_state(network, trajectories, lambda *_: runs_T[:, None] | ~attends_N)
        return FastercacheState(**vars(state), both="".join("1" if one else "0" for one in both_T), conditional=conditional)

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for both branches of guidance in one batch, where one of them is left out, and for the sampler that tells which is which."""
        if self.unconditional_every > 1 and calls:
            yield from reasons(lambda: _require_halves(network, calls[0]))
            if self.conditional == "found":
                yield from reasons(lambda: sampler_of(network))

    def on(self, network: Network, state: FastercacheState) -> AbstractContextManager[Any]:
        """Extrapolate and guess by the tables."""
        schedule = Schedule.of(network, state)
        make = partial(_Changing, weights=self._weights(schedule.computed_TN.all(-1).tolist()))
        if state.conditional == "":
            return caching(network, schedule, make)
        halves = CFGBatch(tuple(one == "1" for one in state.both), state.conditional)
        gains = [
            (self.low if _within(step, self.low_window) else 1.0, self.high if _within(step, self.high_window) else 1.0)
            for step in schedule.steps
        ]
        return guided(network, schedule, make, halves, _Bands(gains))

    def _conditional(self, network: Network, trajectories: Trajectories) -> Half:
        """Return the half that has the condition: guidance goes from the other one towards it and beyond."""
        _require_halves(network, trajectories.first)
        if self.conditional != "found":
            return self.conditional
        (run,) = replays(network, replace(trajectories, calls=trajectories.calls[: len(trajectories.steps)]))
        return "first" if run.guidance > 0.5 else "second"

    def _weights(self, runs: Sequence[bool]) -> list[float]:
        """The weight of the last change at each step."""
        out = [place for place, one in enumerate(runs) if not one] or [0]
        span = max(out[-1] - out[0], 1)
        return [self.weight_first + (self.weight_last - self.weight_first) * (place - out[0]) / span for place in range(len(runs))]


def _within(step: float, window: tuple[float, float]) -> bool:
    return window[0] < step < window[1]


def both_run(steps: Sequence[float], every: int, window: tuple[float, float]) -> list[bool]:
    """Return at which steps both halves run: the first, those outside of the window, and every so many."""
    return [place % every == 0 or not _within(step, window) for place, step in enumerate(steps)]


def attention_runs(steps: Sequence[float], both: Sequence[bool], every: int, window: tuple[float, float]) -> list[bool]:
    """Return at which steps attention runs: every so many, outside of the window, and where its last outputs lack a half that runs."""
    runs: list[bool] = []
    whole: list[bool] = []
    for place, step in enumerate(steps):
        out = place % every > 0 and _within(step, window) and (not both[place] or all(whole[-2:]))
        if not out:
            whole.append(both[place])
        runs.append(not out)
    return runs


def bands(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high frequencies of images (..., H, W): those within a fifth of the shorter side of zero, and the rest."""
    height, width = x.shape[-2:]
    row_H, column_W = (torch.arange(size, device=x.device) for size in (height, width // 2 + 1))
    row_H = torch.minimum(row_H, height - row_H)
    near_HW = row_H[:, None] ** 2 + column_W**2 <= (min(height, width) // 5) ** 2
    low = torch.fft.irfft2(torch.fft.rfft2(x) * near_HW, s=(height, width))
    return low, x - low


def _require_halves(network: Network, call: Call) -> None:
    """Raise AerogelError where a recorded batch has no unconditional half that could be made from the other."""
    alone = "set unconditional_every to 1 to leave out attention only"
    x = latent_of(network.module, call.args, call.kwargs)
    require_pair(x, alone)
    if x.ndim < 4:
        raise AerogelError(
            f"{type(network.module).__name__} denoises {x.ndim} dimensions {tuple(x.shape)}, which have no height and width whose "
            f"frequencies could be told apart; {alone}"
        )


class _Bands(UncondPredictor):
    """Remembers how the halves differ, in two bands that grow apart from each other."""

    def __init__(self, gains: Sequence[tuple[float, float]]) -> None:
        self._gains = gains

    def learn(self, conditional: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        return bands(unconditional.float() - conditional.float())

    def make(self, step: int, conditional: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        low, high = (band * gain for band, gain in zip(memory, self._gains[step], strict=True))
        return (conditional.float() + low + high).to(conditional.dtype), (low, high)


class _Output(NamedTuple):
    """Output of a module when it ran."""

    made: Any
    whole: bool
    """True where it is of both halves of the batch."""


class _Changing(HalfBatchEntry):
    """Holds the last two outputs of a module."""

    remembers: ClassVar[bool] = True

    def __init__(self, own: Callable[..., Any], weights: Sequence[float]) -> None:
        super().__init__(own)
        self._weights = weights

    def keep(self, made: Any) -> tuple[_Output, ...]:
        """The output and the one before it, the newest first."""
        before: tuple[_Output, ...] = self.value or ()
        return (_Output(made, self.half is None), *before[:1])

    def give(self) -> tuple[Any, Any]:
        """The last output, moved on by its last change."""
        last, *before = (self._at_hand(output) for output in self.value)
        weight = self._weights[self.row]
        for old in before:
            last = pytree.tree_map(lambda a, b: a + (a - b) * weight, last, old)
        return last, self.value

    def _at_hand(self, output: _Output) -> Any:
        """Return the part of the half that runs."""
        return map_tensors(self.half, output.made) if output.whole and self.half is not None else output.made
