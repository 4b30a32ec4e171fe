"""The clock of a denoiser: which step of its sampler each sample of a batch is at, read from the time step that a forward gets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError


class Clock:
    """Turns time steps into rows of tables; everything that depends on the step holds the same clock.

    Rows count the distinct time steps of a sampler in the order in which they come. They are found by looking a time step up, never by
    arithmetic on it: samplers space, repeat and round their steps as they like.
    """

    def __init__(self, steps: Sequence[float], sampler: str = "") -> None:
        self.steps = tuple(dict.fromkeys(float(step) for step in steps))
        self.sampler = sampler
        """What gave the steps, for error messages."""
        self._row_of = {step: row for row, step in enumerate(self.steps)}
        self._rows: tuple[int, ...] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The row of every sample of the batch at hand; raises AerogelError outside of a forward."""
        if self._rows is None:
            raise AerogelError("a layer whose scale depends on the time step ran outside of its denoiser; run the whole denoiser")
        return self._rows

    def rows_of(self, timestep: Any) -> tuple[int, ...]:
        """The rows of time steps; raises AerogelError that names a step it does not know."""
        found = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep]
        if unknown := [step for step in found if float(step) not in self._row_of]:
            first, last = self.steps[0], self.steps[-1]
            raise AerogelError(
                f"time step {unknown[0]} is not among the {len(self.steps)} of {self.sampler or 'the sampler'} "
                f"({first:g} to {last:g}) that this denoiser was calibrated for; use that sampler with that many steps, or calibrate again"
            )
        return tuple(self._row_of[float(step)] for step in found)

    @contextmanager
    def at(self, rows: Sequence[int]) -> Iterator[None]:
        """Set the rows for a while."""
        before, self._rows = self._rows, tuple(rows)
        try:
            yield
        finally:
            self._rows = before

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[None]:
        """Follow the forwards of a denoiser for a while."""
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

        def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs["timestep"] if "timestep" in kwargs else args[names.index("timestep")]
            self._rows = self.rows_of(given)

        def stop(*_: Any) -> None:
            self._rows = None

        handles = [
            denoiser.register_forward_pre_hook(start, with_kwargs=True),
            denoiser.register_forward_hook(stop, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PerRow(nn.Module):
    """Runs a module on one sample of each row and gives every sample of the row the same result.

    What depends on the step alone is thereby the same in every batch, bit for bit, and costs one sample. Shapes: (N, C) -> (N, D), or
    (1, C) -> (1, D).
    """

    def __init__(self, inner: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.inner = inner
        self.clock = clock

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return inner(x) row by row."""
        rows = self.clock.rows
        rows = rows if len(rows) == len(x_NC) else rows * len(x_NC)
        first = {row: number for number, row in reversed(list(enumerate(rows)))}
        made = {}
        for row, number in first.items():
            with self.clock.at((row,)):
                made[row] = self.inner(x_NC[number : number + 1])
        if len(made) == 1:
            return next(iter(made.values())).expand(len(x_NC), -1)
        return torch.cat([made[row] for row in rows])
