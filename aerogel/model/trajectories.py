"""Recorded generations of a denoiser: its calls by step and guidance branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.layers.timestep_index import precision_of, timestep_of
from aerogel.model.calls import Call
from aerogel.model.network import Network


@dataclass(frozen=True)
class Trajectory:
    """One generation, with one call a step; guidance branches that come in calls of their own are joined to halves of a batch."""

    steps: tuple[float, ...]
    """The time step of each call."""
    calls: tuple[Call, ...]
    cfg_batch: bool
    """True where both guidance branches are in one batch: the second half of the latents is the first once more."""


@dataclass(frozen=True)
class Trajectories:
    """All recorded generations; built once from the calls, each view of them is computed when it is first read."""

    denoiser: nn.Module
    sampler: str
    """Class name of the pipeline's sampler; empty without a pipeline."""
    calls: tuple[Call, ...]
    """As they were recorded: every step, and every guidance branch that has a call of its own."""
    repeating: bool = True
    """False where the sampler is known to have no step twice in a row, as PNDM and Heun have."""

    @classmethod
    def of(cls, network: Network, calls: Sequence[Call]) -> Trajectories:
        """Build them from the calls that a network's denoiser was recorded with.

        Raises AerogelError where a cache of diffusers is on, which would answer for the denoiser.
        """
        require_uncached(network.module)
        scheduler = getattr(network.processor, "scheduler", None)
        given = getattr(scheduler, "timesteps", None)
        repeating = given is None or repeats(given.tolist())
        return cls(network.module, "" if scheduler is None else type(scheduler).__name__, tuple(calls), repeating)

    @property
    def first(self) -> Call:
        """The first recorded call; raises AerogelError where there is none."""
        if not self.calls:
            raise AerogelError("no recorded calls: give samples, or a pipeline that they can be recorded from")
        return self.calls[0]

    @cached_property
    def call_steps(self) -> tuple[float, ...]:
        """The time step of each recorded call; raises AerogelError where the samples of one are at several."""
        return tuple(step_of(self.denoiser, call.args, call.kwargs) for call in self.calls)

    @cached_property
    def steps(self) -> tuple[float, ...]:
        """The time steps of the first generation, in order; guidance branches in calls of their own count once.

        A step that the sampler repeats counts each time: its calls have other latents. Raises AerogelError without calls.
        """
        assert self.first, "there is one"
        found, again = list[float](), False
        for place, step in enumerate(self.call_steps):
            again = place > 0 and step == self.call_steps[place - 1]
            if place and step == found[0] and not again:
                break
            if not again or (step != found[0] and self._moves(place)):
                found.append(step)
        return tuple(found)

    def _moves(self, place: int) -> bool:
        """Return whether a call denoises something else than the one before it, so that the sampler has made a step between."""
        if not self.repeating:
            return False
        before, now = (self._latent(self.calls[one]) for one in (place - 1, place))
        return before.shape != now.shape or not torch.equal(before, now)

    @property
    def precision(self) -> float | None:
        """The relative precision in which the time steps were given to the denoiser; None for whole numbers."""
        return precision_of(timestep_of(self.denoiser, self.first.args, self.first.kwargs)) or None

    @property
    def thousandths(self) -> tuple[float, ...]:
        """The same steps counted to a thousand, also where the denoiser is given shares of the way instead (Flux)."""
        return tuple(1000 * step for step in self.steps) if max(self.steps) <= 1 else self.steps

    @property
    def distinct_steps(self) -> tuple[float, ...]:
        """The distinct time steps in the order in which they come; the samples of a call may be at several."""
        given = (timestep_of(self.denoiser, call.args, call.kwargs) for call in self.calls)
        found = (step for one in given for step in (one.flatten().tolist() if isinstance(one, Tensor) else [one]))
        return tuple(dict.fromkeys(float(step) for step in found))

    @cached_property
    def runs(self) -> tuple[Trajectory, ...]:
        """The generations one by one.

        Raises AerogelError where the calls are not whole generations, and where guidance branches in calls of their own differ in size.
        """
        once, calls = self.steps, self._joined()
        steps = [step_of(self.denoiser, call.args, call.kwargs) for call in calls]
        if len(once) < 2 or steps != list(once) * (len(calls) // len(once)):
            raise AerogelError(
                f"{len(calls)} recorded calls are not generations of {len(once)} steps, one call a step: "
                "samplers that call the denoiser several times a step do not serve here"
            )
        starts = range(0, len(calls), len(once))
        return tuple(Trajectory(once, tuple(calls[at : at + len(once)]), same_twice(self._latent(calls[at]))) for at in starts)

    def _joined(self) -> Sequence[Call]:
        """The calls, with guidance branches that came one behind the other (Wan, true guidance of Flux) as halves of one batch."""
        found = []
        for first, second, *steps in zip(self.calls[::2], self.calls[1::2], self.call_steps[::2], self.call_steps[1::2], strict=False):
            latents = [self._latent(call) for call in (first, second)]
            if len(set(steps)) > 1 or not torch.equal(*latents):
                return self.calls
            found.append(_both(first, second, len(latents[0])))
        return found if 2 * len(found) == len(self.calls) else self.calls

    def _latent(self, call: Call) -> Tensor:
        return latent_of(self.denoiser, call.args, call.kwargs)


def _both(first: Call, second: Call, samples: int) -> Call:
    def join(one: Any, other: Any) -> Any:
        if not isinstance(one, Tensor) or not one.ndim or len(one) != samples:
            return one
        if one.shape != other.shape:
            raise AerogelError(
                f"the branches of guidance come in calls of their own, with {tuple(one.shape)} and {tuple(other.shape)}: "
                "pad their prompts to one length"
            )
        return torch.cat([one, other])

    args, kwargs = pytree.tree_map(join, (first.args, first.kwargs), (second.args, second.kwargs))
    return Call(args, kwargs)


def require_uncached(denoiser: nn.Module) -> None:
    """Raise AerogelError where a cache of diffusers is on the denoiser."""
    if getattr(denoiser, "is_cache_enabled", False) is True:
        kind = type(getattr(denoiser, "_cache_config", None)).__name__
        raise AerogelError(
            f"a cache of diffusers ({kind}) is on this {type(denoiser).__name__}, and two caches would answer with each other's outputs: "
            "call its disable_cache() first, or leave the policy out"
        )


def repeats(steps: Sequence[float]) -> bool:
    """Return whether a step follows itself."""
    return any(one == other for one, other in pairwise(steps))


def step_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Return the time step of a forward; raises AerogelError where its samples are at several.

    Where each token has a step of its own (Wan 2.2 with expand_timesteps) a sample is at the largest: tokens of a given image have 0.
    """
    timestep = timestep_of(denoiser, args, kwargs)
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        timestep = timestep.flatten(1).amax(1)
    found = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
    if len(found) != 1:
        raise AerogelError(f"a forward over {len(found)} different time steps: a cache needs all samples at one step")
    return float(found.pop())


def has_step_by_token(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a forward gives each token a time step of its own."""
    timestep = timestep_of(denoiser, args, kwargs)
    return isinstance(timestep, Tensor) and timestep.ndim > 1


def latent_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a forward denoises: the first argument."""
    name = arguments_of(denoiser)[0]
    given: Tensor = kwargs[name] if name in kwargs else args[0]
    return given


def same_twice(x: Tensor) -> bool:
    """Return whether the second half of a batch is the first once more, as with both guidance branches in one batch."""
    return len(x) % 2 == 0 and torch.equal(*x.chunk(2))
