"""Follows the forwards of a denoiser: which branch of guidance each belongs to, which step it is, and when a new run begins.

A step is one call of the denoiser in a guidance stream. Steps are counted, and each is checked against the time step it ought to have.
Streams (the branches of guidance that come in calls of their own) never see each other's memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.timestep_index import in_use, is_same_step, precision_of, timestep_of
from aerogel.model.calls import bytes_in, tensors_in
from aerogel.model.trajectories import latent_of, repeats, require_uncached, step_of
from aerogel.runtime.policy_state import PolicyState

_BRANCH = "branch {}"
_CONTEXT = "cache_context"
"""The method by which diffusers' pipelines name the branch of guidance that comes next."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureCacheState(PolicyState):
    """The steps that a feature cache was made for; caches add what they skip at which of them."""

    steps: tuple[float, ...]
    """The sampler's time steps, in order."""
    sampler: str
    """Class of the scheduler; empty where the model came without one."""
    precision: float | None = None
    """Relative precision in which the steps were recorded; None where they were whole numbers, or by an earlier release."""


class StreamTracker(ABC):
    """Follows the forwards of a denoiser by the steps it was made for; what a stream remembers of its run is up to who inherits."""

    def __init__(self, steps: tuple[float, ...], sampler: str, pipeline: Any = None, precision: float | None = None) -> None:
        self.steps, self.sampler, self._pipeline = steps, sampler, pipeline
        self._own_precision = self._precision = precision or 0.0
        self._repeats = repeats(steps)
        self.forwards = 0
        """Forwards of the denoiser since it was put on."""
        self.peak_bytes = 0
        """The most that all memories held between two forwards."""
        self._timesteps: Any = None
        """The list of the run at hand, which a pipeline's sampler makes anew for each."""
        self._named: dict[threading.Thread, str] = {}
        self._guard = ForwardGuard()
        self._thread: threading.Thread | None = None
        """The thread of the run at hand."""
        self._stream = ""
        self._last: tuple[float, int] | None = None
        self._last_latent: Tensor | None = None
        """Latent of the last forward, where a step may follow itself."""
        self._next: dict[str, int] = {}
        self.memories: dict[str, Any] = {}
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
        self.memories.clear()
        self._shape.clear()
        self._last = self._last_latent = None
        self.drop()

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: find the stream and the step; what is returned takes the place of (args, kwargs)."""
        self._guard.enter(denoiser)
        require_uncached(denoiser)
        step = step_of(denoiser, args, kwargs)
        self._precision = max(self._own_precision, precision_of(timestep_of(denoiser, args, kwargs)))
        timesteps = getattr(getattr(self._pipeline, "scheduler", None), "timesteps", None)
        if timesteps is not self._timesteps:  # also where the last run was given up
            self.reset()
            self._timesteps = timesteps
        self._require_own_run(denoiser, step)
        latent = latent_of(denoiser, args, kwargs) if self._repeats else None
        self._stream = self._named.get(threading.current_thread()) or self._branch(step, latent)
        row = self._place(step)
        first = tensors_in((args, kwargs))[0]
        like = (first.shape, first.dtype, first.device)
        if self._shape.get(self._stream) != like:  # what was kept fits no more
            self.memories.pop(self._stream, None)
        self._shape[self._stream] = like
        self._next[self._stream] = row + 1
        self.forwards += 1
        self.begin(row, self.memories.pop(self._stream, None))

    def stop(self, _: nn.Module, __: Any, output: Any) -> Any:
        """After a forward: put the stream's memory away; after one that failed, forget all. What is returned takes the output's place."""
        if not self._guard.leave():
            return
        if output is None:
            self.reset()
            return
        self.memories[self._stream] = self.end()
        self.peak_bytes = max(self.peak_bytes, sum(map(self.held_bytes, self.memories.values())))

    def _require_own_run(self, denoiser: nn.Module, step: float) -> None:
        """Let a thread begin a run at the first step; raises AerogelError for a later step in the middle of another thread's run."""
        me = threading.current_thread()
        if self._thread is not me and self._next:
            if not self._is_at(step, 0):
                self._guard.leave()  # the run of the other thread stays what it is
                raise AerogelError(
                    f"thread {me.name} continues a run of {type(denoiser).__name__} in the middle of a run of thread "
                    f"{self._thread.name if self._thread else ''}, and a feature cache is on, which serves one run at a time: make one run "
                    "after the other, or open the model once for each thread"
                )
            self.reset()
        self._thread = me

    @contextmanager
    def named(self, stream: str) -> Iterator[None]:
        """Say for a while to which branch of guidance the forwards of this thread belong."""
        me = threading.current_thread()
        before = self._named.get(me)
        self._named[me] = stream
        try:
            yield
        finally:
            self._named.pop(me)
            if before is not None:
                self._named[me] = before

    def _branch(self, step: float, latent: Tensor | None) -> str:
        """The stream of a forward of which no pipeline says whose it is: calls of one step in a row are the branches of guidance.

        A step that the sampler repeats comes with another latent.
        """
        branch = 0
        if self._last is not None and self._last[0] == step:
            known = latent is not None and self._last_latent is not None
            if _equal(latent, self._last_latent) if known else not self._expects(_BRANCH.format(0), step):
                branch = self._last[1] + 1
        self._last, self._last_latent = (step, branch), latent
        return _BRANCH.format(branch)

    def _is_at(self, step: float, row: int) -> bool:
        return is_same_step(step, self.steps[row], self._precision)

    def _expects(self, stream: str, step: float) -> bool:
        row = self._next.get(stream, 0)
        return row < len(self.steps) and self._is_at(step, row)

    def _place(self, step: float) -> int:
        """The row that this forward has; a first step begins a new run, and so does a later one where none is under way."""
        row, steps = self._next.get(self._stream, 0), self.steps
        if self._expects(self._stream, step):
            return row
        begins = [0] if self._is_at(step, 0) else self._later(step) if row in (0, len(steps)) else []
        if begins:
            self.memories.pop(self._stream, None)
            # Pipelines that edit an image begin in the middle, and tell the sampler where.
            told = getattr(getattr(self._pipeline, "scheduler", None), "begin_index", None)
            return told if told in begins else begins[0]
        row %= len(steps)
        raise AerogelError(
            f"time step {step:g}{in_use(self._pipeline)} is not the {steps[row]:g} that comes at step {row + 1} of the {len(steps)} of "
            f"{self.sampler or 'the sampler'} ({steps[0]:g} to {steps[-1]:g}) that this cache was made for; "
            "use that sampler with that many steps, or make another cache"
        )

    def _later(self, step: float) -> list[int]:
        return [row for row in range(1, len(self.steps)) if self._is_at(step, row)]


@contextmanager
def tracked(denoiser: nn.Module, by: StreamTracker) -> Iterator[None]:
    """Let forwards be followed for a while, ahead of all other hooks: these see what `by` makes of the arguments.

    Raises AerogelError where another feature cache is on the denoiser, of this package or of diffusers.
    """
    require_uncached(denoiser)
    if any(isinstance(getattr(hook, "__self__", None), StreamTracker) for hook in denoiser._forward_pre_hooks.values()):
        raise AerogelError(
            f"a feature cache is on this {type(denoiser).__name__} already, and two would answer with each other's outputs: take it off "
            "before another is put on, or leave one of them out of the recipe"
        )
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
        with by.named(name), own(name, **kwargs):
            yield

    before = denoiser.__dict__.get(_CONTEXT)
    denoiser.__dict__[_CONTEXT] = told
    try:
        yield
    finally:
        denoiser.__dict__.pop(_CONTEXT)
        if before is not None:
            denoiser.__dict__[_CONTEXT] = before


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y))
