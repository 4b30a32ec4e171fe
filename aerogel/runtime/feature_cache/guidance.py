"""Denoisers that run one half of a batch at some steps: with both branches of guidance in it, the unconditional half is guessed instead.

Pipelines with classifier-free guidance give the denoiser the same samples twice in one batch, once with and once without the condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.calls import map_tensors, tensors_in
from aerogel.model.network import Network
from aerogel.model.trajectories import latent_of, same_twice
from aerogel.runtime.feature_cache.schedule import CacheEntry, ModuleCache, Schedule, make_entries, patched_entries
from aerogel.runtime.feature_cache.streams import tracked

Half = Literal["first", "second"]


@dataclass(frozen=True)
class CFGBatch:
    """Steps at which each half of the batch runs."""

    both: tuple[bool, ...]
    """For each step whether both run; at the others the conditional half runs alone."""
    conditional: Half
    """Half of the batch that has the condition."""

    def cut(self, x: Tensor) -> Tensor:
        """The conditional half of a batch."""
        return x.chunk(2)[self.conditional == "second"]

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional half, and the other."""
        first, second = x.chunk(2)
        return (first, second) if self.conditional == "first" else (second, first)

    def joined(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The whole batch."""
        return torch.cat([conditional, unconditional] if self.conditional == "first" else [unconditional, conditional])


class UncondPredictor(ABC):
    """Makes the unconditional output out of the conditional one."""

    @abstractmethod
    def learn(self, conditional: Tensor, unconditional: Tensor) -> Any:
        """See both at a step, and return what is to be remembered of them."""

    @abstractmethod
    def make(self, step: int, conditional: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the unconditional output at a step, and what is to be remembered from then on."""


class HalfBatchEntry(CacheEntry):
    """A cache entry that may be asked for the conditional half alone, whatever it keeps."""

    half: Callable[[Tensor], Tensor] | None = None
    """Function that cuts that half out of a batch, at steps at which nothing else runs."""


class Guided(ModuleCache):
    """Follows the forwards of a denoiser, gives it half of the batch at some steps, and puts the other half in its place behind it."""

    def __init__(
        self, schedule: Schedule, entries: Mapping[str, HalfBatchEntry], halves: CFGBatch, guess: UncondPredictor, pipeline: Any = None
    ) -> None:
        super().__init__(schedule, entries, pipeline)
        self._half_entries, self._halves, self._guess = entries, halves, guess
        self._row, self._begins, self._alone = 0, True, False
        self._known: list[Any] | None = None
        """Memory of each output's two halves; None where no step needs it."""

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: find its step, and take the conditional half out of all that is of the batch's length if that runs alone.

        Raises AerogelError when a run begins whose batch is not the same samples twice.
        """
        super().start(denoiser, args, kwargs)
        x = latent_of(denoiser, args, kwargs)
        if self._begins and not same_twice(x):
            raise AerogelError(
                f"the batch of {len(x)} samples is not the same samples twice, but this cache was made for both branches of guidance in "
                "one batch; run the pipeline with guidance as it was recorded, or make another cache"
            )
        if not self._alone:
            return None
        return map_tensors(lambda given: self._halves.cut(given) if given.ndim and len(given) == len(x) else given, (args, kwargs))

    def begin(self, row: int, memory: Any) -> None:
        """Set the cache entries, and find out which half runs."""
        held, self._known = memory or ({}, None)
        self._row, self._begins = row, memory is None
        self._alone = not self._halves.both[row] and self._known is not None
        for entry in self._half_entries.values():
            entry.half = self._halves.cut if self._alone else None
        super().begin(row, held)

    def stop(self, denoiser: nn.Module, given: Any, output: Any) -> Any:
        """After a forward: put the guessed half beside the one that ran, or see how the two differ."""
        made = None if output is None else self._widened(output)
        super().stop(denoiser, given, output)
        return made

    def _widened(self, output: Any) -> Any:
        needed = not all(self._halves.both[self._row + 1 : self._row + 2])
        if not self._alone:
            halves = [self._halves.parted(given) for given in tensors_in(output)] if needed else []
            self._known = [self._guess.learn(*pair) for pair in halves] or None
            return None
        known, later = iter(self._known or ()), []

        def whole(conditional: Tensor) -> Tensor:
            unconditional, memory = self._guess.make(self._row, conditional, next(known))
            later.append(memory)
            return self._halves.joined(conditional, unconditional)

        made = map_tensors(whole, output)
        self._known = later if needed else None
        return made

    def end(self) -> Any:
        """Return the content of the cache entries, and of the halves."""
        known = self._known
        return super().end(), known

    def drop(self) -> None:
        """Empty the cache entries, and forget the halves."""
        super().drop()
        self._known, self._alone = None, False


@contextmanager
def guided(
    network: Network, schedule: Schedule, make: Callable[[Callable[..., Any]], HalfBatchEntry], halves: CFGBatch, guess: UncondPredictor
) -> Iterator[Guided]:
    """Put a schedule and the halves on the denoiser for a while; afterwards it is what it was."""
    entries, answers = make_entries(network, make)
    guidance = Guided(schedule, entries, halves, guess, network.processor)
    with patched_entries(network.module, entries, answers), tracked(network.module, guidance):
        yield guidance


def require_pair(x: Tensor, otherwise: str) -> None:
    """Raise AerogelError where a recorded batch has not both branches of guidance; `otherwise` says what to do then."""
    if not same_twice(x):
        raise AerogelError(
            f"the recorded batch of {len(x)} samples is not the same samples twice: this pipeline has no guidance, or runs its branches in "
            f"calls of their own, so that there is no unconditional half of a batch to leave out; {otherwise}"
        )
