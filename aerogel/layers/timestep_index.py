"""The step of its sampler that each sample of a denoiser's batch is at, read from the time step that a forward gets."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aerogel.errors import AerogelError
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.signature import arguments_of


class TimestepIndex:
    """Turns time steps into rows of tables; everything that depends on the step holds the same index.

    Rows count the distinct time steps of a sampler in the order in which they come. They are found by looking a time step up, never by
    arithmetic on it: samplers space, repeat and round their steps as they like.
    """

    def __init__(self, steps: Sequence[float], sampler: str = "") -> None:
        self.steps = tuple(dict.fromkeys(float(step) for step in steps))
        self.sampler = sampler
        """Name of the sampler that gave the steps, for error messages."""
        self._pipeline: weakref.ref[Any] | None = None
        self._row_of = {step: row for row, step in enumerate(self.steps)}
        self.once_per_step: tuple[str, ...] = ()
        """Full names of the modules that run once for each step of a batch."""
        self._rows: tuple[int, ...] | None = None
        self._expanded: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
        self._guard = ForwardGuard()

    def set_pipeline(self, pipeline: Any) -> None:
        """Remember the pipeline that makes the forwards, so that an error can name the sampler that it has by then."""
        # Weakly: a copy of the network must not copy its pipeline.
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)

    @property
    def rows(self) -> tuple[int, ...]:
        """The row of every sample of the current batch; raises AerogelError outside of a forward."""
        if self._rows is None:
            raise AerogelError("a layer whose scale depends on the time step ran outside of its denoiser; run the whole denoiser")
        return self._rows

    def rows_of(self, timestep: Any) -> tuple[int, ...]:
        """Return the rows of time steps; raises AerogelError that names a step it does not know."""
        if isinstance(timestep, Tensor) and timestep.ndim > 1:
            raise AerogelError(
                f"time steps of shape {tuple(timestep.shape)}, one for each token (expand_timesteps): layers that depend on the time step "
                "serve one step a sample; leave the temporal methods out for this model"
            )
        found, precision = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep], precision_of(timestep)
        rows = {step: self._row(float(step), precision) for step in found}
        if unknown := [step for step, row in rows.items() if row is None]:
            first, last = self.steps[0], self.steps[-1]
            use = in_use(self._pipeline() if self._pipeline else None)
            raise AerogelError(
                f"time step {unknown[0]}{use} is not among the {len(self.steps)} of {self.sampler or 'the sampler'} "
                f"({first:g} to {last:g}) that this denoiser was calibrated for; use that sampler with that many steps, or calibrate again"
            )
        return tuple(row for step in found if (row := rows[step]) is not None)

    def _row(self, step: float, precision: float) -> int | None:
        """Return the row of a step, or of the nearest where it is that step in a coarser dtype."""
        if step in self._row_of or not self.steps:
            return self._row_of.get(step)
        nearest = min(self.steps, key=lambda one: abs(one - step))
        return self._row_of[nearest] if is_same_step(step, nearest, precision) else None

    @contextmanager
    def at(self, rows: Sequence[int]) -> Iterator[None]:
        """Set the rows for a while."""
        before, self._rows = self._rows, tuple(rows)
        try:
            yield
        finally:
            self._rows = before

    def track(self, denoiser: nn.Module, once_per_step: Iterable[str] = ()) -> list[RemovableHandle]:
        """Read the time step of each forward of a denoiser until the handles are removed.

        Modules named in `once_per_step` depend on the step alone: they run on one sample of each row, whose result is expanded to the
        others, so that it is the same in every batch, bit for bit.
        """
        self.once_per_step = tuple(once_per_step)
        handles = [
            denoiser.register_forward_pre_hook(self._start, with_kwargs=True),
            denoiser.register_forward_hook(self._stop, always_call=True),
        ]
        for name in self.once_per_step:
            module = denoiser.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._select_steps))
            handles.append(module.register_forward_hook(self._expand_steps, always_call=True))
        return handles

    @contextmanager
    def on(self, denoiser: nn.Module, once_per_step: Iterable[str] = ()) -> Iterator[None]:
        """Track a denoiser inside the context."""
        handles = self.track(denoiser, once_per_step)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def untrack(self, denoiser: nn.Module) -> None:
        """Remove the hooks of every `track` from a denoiser."""
        for module in denoiser.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]

    # Bound methods, because a copy of a network must get hooks of its own index, the one that the copied layers have.
    def _start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A walk stops forwards half-way and then runs a block by itself: the rows stay those of its call until the next one starts.
        self._guard.enter(denoiser)
        self._expanded.clear()
        self._rows = self.rows_of(timestep_of(denoiser, args, kwargs))

    def _stop(self, *_: Any) -> None:
        if self._guard.leave():
            self._rows = None
            self._expanded.clear()

    def _select_steps(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_NC, *rest = args
        rows = self.rows if len(self.rows) == len(x_NC) else self.rows * len(x_NC)
        self._expanded.append((rows, self._rows))
        self._rows = tuple(dict.fromkeys(rows))
        return (x_NC[[rows.index(row) for row in self._rows]], *rest)

    def _expand_steps(self, _: nn.Module, __: Any, y: Any) -> Any:
        narrow, (rows, self._rows) = self.rows, self._expanded.pop()
        if not isinstance(y, Tensor):  # the module failed
            return y
        return y.expand(len(rows), -1) if len(narrow) == 1 else y[[narrow.index(row) for row in rows]]


def precision_of(timestep: Any) -> float:
    """Return the relative precision of a time step's dtype; 0 for whole numbers, and for numbers of Python."""
    return torch.finfo(timestep.dtype).eps if isinstance(timestep, Tensor) and timestep.is_floating_point() else 0.0


def is_same_step(one: float, other: float, precision: float) -> bool:
    """Return whether two time steps are the same but for rounding; pipelines may round twice, as they divide by a thousand."""
    return abs(one - other) <= precision * max(abs(one), abs(other))


def in_use(pipeline: Any) -> str:
    """Return the sampler that a pipeline has now, for messages about a time step; empty without one."""
    scheduler = getattr(pipeline, "scheduler", None)
    steps = getattr(scheduler, "timesteps", None)
    return "" if steps is None else f", one of the {len(set(steps.tolist()))} steps of {type(scheduler).__name__},"


def timestep_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the time step of a call of a denoiser; raises AerogelError when its forward takes none."""
    names = arguments_of(denoiser)
    if "timestep" not in names:
        raise AerogelError(f"{type(denoiser).__name__} takes no timestep; temporal features are those of diffusion denoisers")
    place = names.index("timestep")
    if "timestep" not in kwargs and len(args) <= place:
        raise AerogelError(f"a call gives {type(denoiser).__name__} no timestep; temporal features are those of diffusion denoisers")
    return kwargs["timestep"] if "timestep" in kwargs else args[place]
