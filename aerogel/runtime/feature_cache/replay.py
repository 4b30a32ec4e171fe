"""Generations replayed outside of their pipeline, step by step: a trajectory can be driven by a student, stopped, and forked anywhere.

A recorded generation says all that is needed: what each call got, hence the sampler's steps and the noise it began with. Whether guidance
joins two halves of a batch, and how strongly, is read off the recording, so that no pipeline need be known by name.

B samples, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories, Trajectory, repeats

_CLOSE = 1e-2
"""Largest relative distance between a recorded and a replayed input; half precision needs that much."""
_ROUNDED = 2**-8
"""Relative rounding of bfloat16, which a time step may be given in."""

Denoise = Callable[[int, Call], Tensor]
"""Takes the number of a step and its call and returns what the denoiser gives, guidance branches apart."""


@dataclass(frozen=True)
class State:
    """State of a trajectory before a step."""

    step: int
    x_BCHW: Tensor
    sampler: Any
    """The scheduler, which may remember earlier steps."""

    def fork(self) -> State:
        """The same state, for another future."""
        return State(self.step, self.x_BCHW, copy.deepcopy(self.sampler))


@dataclass(frozen=True)
class Replay:
    """One recorded generation."""

    calls: tuple[Call, ...]
    steps: tuple[float, ...]
    """Time step of each call, as the denoiser is given it."""
    sampler: Any
    """The scheduler at its first step."""
    name: str
    """The argument of the denoiser that is denoised."""
    halves: bool
    """True where both branches of guidance are in one batch."""
    guidance: float = 0.0
    """With halves, the guided output is second + guidance x (first - second)."""

    def start(self) -> State:
        """The recorded beginning."""
        recorded = self._recorded(0)
        return State(0, recorded / self._scale(), copy.deepcopy(self.sampler))

    def noise(self, generator: torch.Generator) -> State:
        """A new beginning, of other noise."""
        like = self._recorded(0)
        noise = torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
        return State(0, noise * float(getattr(self.sampler, "init_noise_sigma", 1.0)), copy.deepcopy(self.sampler))

    def call(self, state: State) -> Call:
        """Return the denoiser's input at a state."""
        x_BCHW = torch.cat([state.x_BCHW] * 2) if self.halves else state.x_BCHW
        given = _scaled(state.sampler, x_BCHW, state.step)
        call = self.calls[state.step]
        return Call(call.args, call.kwargs | {self.name: given})

    def guided(self, output: Tensor) -> Tensor:
        """Join the branches of guidance; differentiable."""
        if not self.halves:
            return output
        first, second = output.chunk(2)
        return second + self.guidance * (first - second)

    def advance(self, state: State, output: Tensor) -> State:
        """The state after a step, for what the denoiser gave; changes the sampler of the given state."""
        given = self.guided(output.detach())[:, : state.x_BCHW.shape[1]]  # what is left is a variance, which no such sampler takes
        x_BCHW = state.sampler.step(given, self.sampler.timesteps[state.step], state.x_BCHW).prev_sample
        return State(state.step + 1, x_BCHW, state.sampler)

    @torch.no_grad()
    def finish(self, state: State, denoise: Denoise) -> Tensor:
        """Go on from a state, which is left as it is, to the end and return x_0."""
        state = state.fork()
        while state.step < len(self.calls):
            state = self.advance(state, denoise(state.step, self.call(state)))
        return state.x_BCHW

    def _recorded(self, step: int) -> Tensor:
        given: Tensor = self.calls[step].kwargs[self.name]
        return given.chunk(2)[0] if self.halves else given

    def _scale(self) -> float:
        """Return the factor by which the sampler multiplies the first input."""
        return _scale_at(self.sampler, 0)


def sampler_of(network: Network) -> Any:
    """Return the sampler of the network's pipeline; raises AerogelError without a pipeline."""
    sampler = getattr(network.processor, "scheduler", None)
    if sampler is None:
        raise AerogelError("the denoiser came without its pipeline: give the pipeline or its folder, so that its sampler can be replayed")
    return sampler


def replays(network: Network, trajectories: Trajectories) -> list[Replay]:
    """Return the generations among recorded calls, each proved to be what the pipeline made.

    Raises AerogelError without a pipeline, for a sampler that draws noise on the way, and where calls are not whole generations.
    """
    sampler = sampler_of(network)
    if repeats(trajectories.steps):
        raise AerogelError(
            f"{type(sampler).__name__} repeats time steps: samplers that call the denoiser several times a step do not serve methods that "
            "replay generations; take another sampler, or a policy that does not replay (fora, smoothcache)"
        )
    recorded = network.teacher or network  # what is compressed meanwhile goes another way
    made = [_replay(recorded, sampler, run) for run in trajectories.runs]
    _prove(recorded, made[0])
    return made


def output_of(given: Any) -> Tensor:
    """The tensor among what a denoiser returns."""
    tensor: Tensor = given if isinstance(given, Tensor) else given[0]
    return tensor


def _replay(network: Network, sampler: Any, trajectory: Trajectory) -> Replay:
    names = arguments_of(network.module)
    name, run = names[0], tuple(Call((), dict(zip(names, call.args, strict=False)) | call.kwargs) for call in trajectory.calls)
    found = Replay(run, trajectory.steps, _at_start(sampler, trajectory.steps), name, trajectory.cfg_batch)
    return replace(found, guidance=_guidance(network, found)) if found.halves else found


def _at_start(sampler: Any, given: Sequence[float]) -> Any:
    """The sampler before the first of the steps that the denoiser was given: set by their number, or else as the pipeline has left it.

    Pipelines may tell it more than a number, such as the image's size; then the last generation has to be one of those recorded.
    """
    fresh = copy.deepcopy(sampler)
    try:
        fresh.set_timesteps(len(given))
    except (TypeError, ValueError) as error:
        why = f"cannot be set to {len(given)} steps by their number alone ({error})"
    else:
        wanted = [float(step) for step in fresh.timesteps]
        if _same(wanted, given):
            return fresh
        apart = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(wanted, given, strict=False))))
        why = f"has other steps than the {len(given)} recorded ones from step {apart + 1} on"
    left = copy.deepcopy(sampler)
    if not hasattr(left, "_step_index") or hasattr(left, "model_outputs") or not _same(left.timesteps.tolist(), given):
        raise AerogelError(f"{type(sampler).__name__} {why}: not replayed")
    left._step_index = None  # it has no other memory of the run before
    return left


def _same(wanted: Sequence[float], given: Sequence[float]) -> bool:
    """Return True where steps are the same; some denoisers are given thousandths of them, in their own precision."""
    if len(wanted) != len(given):
        return False
    return list(wanted) == list(given) or all(abs(step - 1000 * one) <= _ROUNDED * step for step, one in zip(wanted, given, strict=True))


def _scaled(sampler: Any, x: Tensor, step: int) -> Tensor:
    """Return the denoiser's input for a sample; flow-matching samplers scale nothing and do not say so."""
    given: Tensor = sampler.scale_model_input(x, sampler.timesteps[step]) if hasattr(sampler, "scale_model_input") else x
    return given


def _scale_at(sampler: Any, step: int) -> float:
    return float(_scaled(copy.deepcopy(sampler), torch.ones(1, 1, 1, 1), step))


@torch.no_grad()
def _guidance(network: Network, run: Replay) -> float:
    """The guidance that leads from the first recorded input to the second: a step of such a sampler is linear in it."""
    start = run.start()
    first, second = output_of(network.run(run.call(start))).float().chunk(2)
    ends = [run.advance(run.start(), torch.cat([branch, branch]).to(start.x_BCHW.dtype)).x_BCHW.double() for branch in (first, second)]
    target = run._recorded(1).double() / _scale_at(run.sampler, 1)
    along, by = target - ends[1], ends[0] - ends[1]
    return float((along * by).sum() / (by * by).sum().clamp(min=torch.finfo(torch.float64).tiny))


def _prove(network: Network, run: Replay) -> None:
    """Replay a whole recorded generation; raises AerogelError where it does not come out."""
    state = run.start()
    for step in range(len(run.calls)):
        call = run.call(state)
        wanted, given = run.calls[step].kwargs[run.name].float(), call.kwargs[run.name].float()
        apart = float((given - wanted).norm() / wanted.norm())
        if apart > _CLOSE:
            raise AerogelError(
                f"the recorded generation does not replay: at step {step + 1} of {len(run.calls)} its input is {apart:.1%} off; "
                f"{type(run.sampler).__name__} may draw noise on the way, or the pipeline do more than classifier-free guidance"
            )
        state = run.advance(state, output_of(network.run(call)))
