"""Follows the forwards of a denoiser: which branch of guidance each belongs to, which step it is, and when a new run begins.

A step is one call of the denoiser in a guidance stream. Steps are counted, and each is checked against the time step it ought to have.
Streams (the branches of guidance that come in calls of their own) never see each other's memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.layers.timestep_index import in_use, timestep_of
from aerogel.model.calls import Call, bytes_in, tensors_in
from aerogel.model.network import Network

_BRANCH = "branch {}"
_CONTEXT = "cache_context"
"""The method by which diffusers' pipelines name the branch of guidance that comes next."""


class StreamTracker(ABC):
    """Follows the forwards of a denoiser by the steps it was made for; what a stream remembers of its run is up to who inherits."""

    def __init__(self, steps: tuple[float, ...], sampler: str, pipeline: Any = None) -> None:
        self.steps, self.sampler, self._pipeline = steps, sampler, pipeline
        self.forwards = 0
        """Forwards of the denoiser since it was put on."""
        self.peak_bytes = 0
        """The most that all memories held between two forwards."""
        self._timesteps: Any = None
        """The list of the run at hand, which a pipeline's sampler makes anew for each."""
        self._named: str | None = None
        self._stream = ""
        self._last: tuple[float, int] | None = None
        self._next: dict[str, int] = {}
        self._memories: dict[str, Any] = {}
        self._shape: dict[str, Any] = {}

    @abstractmethod
    def begin(self, row: int, memory: Any) -> None:
        """A forward is to come, at this step, of a stream that remembers this; None where its run begins."""

    @abstractmethod
    def end(self) -> Any:
        """The forward is done: return what its stream remembers, and let go of it."""

    @abstractmethod
    def drop(self) -> None:
        """The forward failed, or a run begins: let go of everything."""

    def held_bytes(self, memory: Any) -> int:
        """The bytes of what a stream remembers."""
        return bytes_in(memory)

    def reset(self) -> None:
        """Forget everything that was kept: the next forward begins a run."""
        self._next.clear()
        self._memories.clear()
        self._shape.clear()
        self._last = None
        self.drop()

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: find the stream and the step; what is returned takes the place of (args, kwargs)."""
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
            self._memories.pop(self._stream, None)
        self._shape[self._stream] = like
        self._next[self._stream] = row + 1
        self.forwards += 1
        self.begin(row, self._memories.pop(self._stream, None))

    def stop(self, _: nn.Module, __: Any, output: Any) -> Any:
        """After a forward: put the stream's memory away; after one that failed, forget all. What is returned takes the output's place."""
        if output is None:
            self.reset()
            return
        self._memories[self._stream] = self.end()
        self.peak_bytes = max(self.peak_bytes, sum(map(self.held_bytes, self._memories.values())))

    def _branch(self, step: float) -> str:
        """The stream of a forward of which no pipeline says whose it is: calls of one step in a row are the branches of guidance."""
        branch = 0
        if self._last is not None and self._last[0] == step and not self._expects(_BRANCH.format(0), step):
            branch = self._last[1] + 1
        self._last = (step, branch)
        return _BRANCH.format(branch)

    def _expects(self, stream: str, step: float) -> bool:
        row = self._next.get(stream, 0)
        return row < len(self.steps) and self.steps[row] == step

    def _place(self, step: float) -> int:
        """The row that this forward has; a first step begins a new run."""
        row, steps = self._next.get(self._stream, 0), self.steps
        if self._expects(self._stream, step):
            return row
        if step == steps[0]:
            self._memories.pop(self._stream, None)
            return 0
        row %= len(steps)
        raise AerogelError(
            f"time step {step:g}{in_use(self._pipeline)} is not the {steps[row]:g} that comes at step {row + 1} of the {len(steps)} of "
            f"{self.sampler or 'the sampler'} ({steps[0]:g} to {steps[-1]:g}) that this cache was made for; "
            "use that sampler with that many steps, or make another cache"
        )


@contextmanager
def tracked(denoiser: nn.Module, by: StreamTracker) -> Iterator[None]:
    """Let forwards be followed for a while, ahead of all other hooks: these see what `by` makes of the arguments."""
    hooks = [
        denoiser.register_forward_pre_hook(by.start, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(by.stop, always_call=True),
    ]
    try:
        with _named_streams(denoiser, by):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _named_streams(denoiser: nn.Module, by: StreamTracker) -> Iterator[None]:
    """Hear which branch of guidance a pipeline says that it runs, where its denoiser can be told."""
    own = getattr(denoiser, _CONTEXT, None)
    if own is None:
        yield
        return

    @contextmanager
    def told(name: str, **kwargs: Any) -> Iterator[None]:
        before, by._named = by._named, name
        try:
            with own(name, **kwargs):
                yield
        finally:
            by._named = before

    before = denoiser.__dict__.get(_CONTEXT)
    denoiser.__dict__[_CONTEXT] = told
    try:
        yield
    finally:
        denoiser.__dict__.pop(_CONTEXT)
        if before is not None:
            denoiser.__dict__[_CONTEXT] = before


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


def generations(network: Network, calls: Sequence[Call]) -> list[Sequence[Call]]:
    """Cut recorded calls into whole generations, one call a step; branches of guidance in calls of their own become halves of a batch.

    Raises AerogelError where they are not that, and where such branches are of other sizes.
    """
    once, calls = steps_in(network, calls), _joined(network.module, calls)
    steps = [step_of(network.module, call.args, call.kwargs) for call in calls]
    if len(once) < 2 or steps != list(once) * (len(calls) // len(once)):
        raise AerogelError(
            f"{len(calls)} recorded calls are not generations of {len(once)} steps, one call a step: "
            "samplers that call the denoiser several times a step do not serve here"
        )
    return [calls[start : start + len(once)] for start in range(0, len(calls), len(once))]


def _joined(denoiser: nn.Module, calls: Sequence[Call]) -> Sequence[Call]:
    """The calls, with branches of guidance that came one behind the other (Wan, true guidance of Flux) as halves of one batch."""
    found = []
    for first, second in zip(calls[::2], calls[1::2], strict=False):
        latents = [latent_of(denoiser, call.args, call.kwargs) for call in (first, second)]
        at = {step_of(denoiser, call.args, call.kwargs) for call in (first, second)}
        if len(at) > 1 or not torch.equal(*latents):
            return calls
        found.append(_both(first, second, len(latents[0])))
    return found if 2 * len(found) == len(calls) else calls


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


def latent_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a forward denoises: the first argument."""
    name = arguments_of(denoiser)[0]
    given: Tensor = kwargs[name] if name in kwargs else args[0]
    return given


def same_twice(x: Tensor) -> bool:
    """Whether the second half of a batch is the first once more, as with both branches of guidance in one batch."""
    return len(x) % 2 == 0 and torch.equal(*x.chunk(2))


def step_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The time step of a forward; raises AerogelError where its samples are at several."""
    timestep = timestep_of(denoiser, args, kwargs)
    found = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
    if len(found) != 1:
        raise AerogelError(f"a forward over {len(found)} different time steps: a cache needs all samples at one step")
    return float(found.pop())
