"""One loop that fits parameters to a teacher, a block or a whole network, and gives back the best it saw, or the last.

The loop knows calls by their numbers only: the caller's closure runs the student on a few of them and compares it with the teacher. The
loss over all calls is measured before the first step and every `check` steps; the parameters end where it was least, so a fit never
leaves a student worse than it found it. Left out on purpose: mixed precision and gradient accumulation, which are the closure's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError

Loss = Callable[[Sequence[int]], Tensor]
"""Takes the numbers of some calls and returns the scalar loss over them."""


_watcher: ContextVar[Callable[[float], None]] = ContextVar("watcher", default=lambda share: None)


@contextmanager
def watched(see: Callable[[float], None]) -> Iterator[None]:
    """Call `see(share of the steps done)` about a hundred times in every fit inside: a long one should not look like a stop."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


def progressed(share: float) -> None:
    """Tell whoever watches how much of a long computation is done."""
    _watcher.get()(share)


@dataclass(frozen=True)
class Fit:
    """Settings of a fit."""

    steps: int = 200
    """Optimiser steps."""
    batch: int = 8
    """Calls in a step."""
    rate: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    floor: float = 0.05
    """Share of the peak rate that the cosine ends at."""
    decay: float = 0.0
    """Weight decay: decoupled in adamw, added to the gradient in adam."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0 does not clip."""
    check: int = 50
    """Steps between measurements of the loss over all calls."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Optimiser."""
    keep: Literal["best", "last"] = "best"
    """Parameters to keep: the best by the loss over all calls, or the last, where the loss itself changes on the way."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0 (arXiv:1608.03983, one cycle)."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass
class History:
    """Record of a fit."""

    losses: list[float] = field(default_factory=list)
    """Loss of each step's batch, before the step."""
    checks: dict[int, float] = field(default_factory=dict)
    """Loss over all calls after so many steps; 0 is before the fit."""
    warning: str | None = None
    """Why the fit ended early, if it did."""

    @property
    def best(self) -> int:
        """After how many steps the parameters were the ones that were kept."""
        return min(self.checks, key=lambda step: self.checks[step])


def fit(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    calls: int,
    how: Fit,
    generator: torch.Generator,
    before: Callable[[int], None] = lambda step: None,
) -> History:
    """Fit `parameters` (any dtype Adam works in, in place) so that `loss` over `calls` calls becomes small; return its history.

    `before(step)` is told of every step, counted from 0. The same generator state gives the same fit. A loss or gradient that is not
    finite ends the fit with the best parameters so far (the last measured ones where the last are kept) and a
    warning; raises AerogelError when the loss is not finite to begin with.
    """
    if not parameters or calls < 1:
        raise AerogelError(f"nothing to fit: {len(parameters)} parameters, {calls} calls; expected at least one of each")
    history = History()
    with _trainable(parameters):
        history.checks[0] = _measure(loss, calls, how.batch)
        if not math.isfinite(history.checks[0]):
            raise AerogelError(f"the loss is {history.checks[0]} before the first step: the student or its teacher is not finite")
        best = [parameter.detach().clone() for parameter in parameters]
        optimizer = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[how.optimizer](parameters, lr=how.rate, weight_decay=how.decay)
        for step, batch in zip(range(1, how.steps + 1), _batches(calls, how.batch, generator), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = how.rate_at(step - 1)
            before(step - 1)
            if step % max(1, how.steps // 100) == 0:
                _watcher.get()(step / how.steps)
            trouble = _step(parameters, loss, batch, optimizer, how.clip, history)
            if trouble is None and (step % how.check == 0 or step == how.steps):
                score = _measure(loss, calls, how.batch)
                if math.isfinite(score):
                    history.checks[step] = score
                    better = how.keep == "last" or history.best == step
                    best = [parameter.detach().clone() for parameter in parameters] if better else best
                else:
                    trouble = f"the loss over all calls is {score}"
            if trouble is not None:
                history.warning = f"{trouble} at step {step} of {how.steps}; kept the parameters of step {_kept(history, how)}"
                break
        with torch.no_grad():
            for parameter, kept in zip(parameters, best, strict=True):
                parameter.copy_(kept)
    return history


def _kept(history: History, how: Fit) -> int:
    return history.best if how.keep == "best" else max(history.checks)


def _step(
    parameters: Sequence[nn.Parameter], loss: Loss, batch: Sequence[int], optimizer: torch.optim.Optimizer, clip: float, history: History
) -> str | None:
    """Take one step, or leave the parameters alone and say what is not finite."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(batch)
    history.losses.append(float(value.detach()))
    if not math.isfinite(history.losses[-1]):
        return f"the loss is {history.losses[-1]}"
    value.backward()
    norm = float(nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf))
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    optimizer.step()
    return None


@torch.no_grad()
def _measure(loss: Loss, calls: int, batch: int) -> float:
    parts = torch.arange(calls).split(batch)
    return sum(float(loss(part.tolist())) * len(part) for part in parts) / calls


def _batches(calls: int, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless passes over all calls, each in a new order."""
    while True:
        for part in torch.randperm(calls, generator=generator).split(batch):
            yield part.tolist()


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients are on for these parameters inside, and everything about gradients is as before outside."""
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, (required, gradient) in zip(parameters, before, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(required)
