"""Fair timing: networks take turns in one process, and memory is what the weights and all other tensors need while one runs."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch.autograd.profiler import profile

from aerogel.evaluate.measure import Measure
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network

_QUIET = "KINETO_LOG_LEVEL"
"""Environment variable by which the profiler of torch is told what to print; without it two lines a use."""
Facts = dict[str, dict[str, Any]]
"""Figures by model."""


@dataclass(frozen=True)
class Timed(Measure):
    """A measure of speed.

    Networks take turns round after round (A B A B), so that a busy machine slows all of them alike; figures are medians, and speed-ups are
    medians of the ratios within a round.
    """

    asked: ClassVar[bool] = True

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return the facts of `network` as in `compare`, with speed-ups over `against` when it is given."""
        sides = {"network": network} if against is None else {"against": against, "network": network}
        return self.compare(sides)["network"]

    @abstractmethod
    def compare(self, networks: dict[str, Network]) -> Facts:
        """Return the facts of each network by name, speed-ups over the first; raises AerogelError for what cannot be timed."""


class Runner(Protocol):
    """One network's turns."""

    def warm(self) -> None:
        """The turn that does not count: kernels are chosen and weights packed, memory grows to its peak."""

    def turn(self) -> None:
        """One turn that counts."""

    def facts(self, first: Any) -> dict[str, Any]:
        """Summarize the rounds, with speed-ups over the first runner."""


def take_turns(make: Callable[[str, Network], Runner], networks: Mapping[str, Network], rounds: int, threads: int | None) -> Facts:
    """Let each network have its turn, round after round, and return the facts of each by name."""
    with limited(threads):
        runners = {name: make(name, network) for name, network in networks.items()}
        for runner in runners.values():
            runner.warm()
        for _ in range(rounds):
            for runner in runners.values():
                runner.turn()
        first = next(iter(runners.values()))
        return {name: runner.facts(first) for name, runner in runners.items()}


def peak_memory(network: Network, first: Callable[[], Any], again: Callable[[], Any]) -> int:
    """Return the bytes of a network's weights and the most that other tensors took while `again` ran, whatever ran before.

    `first` runs before: kernels are chosen by trial there, and what it packs is gone when it ends, so that `again` packs it anew.
    """
    first()
    for part in network.module.modules():
        if isinstance(part, QuantLinear):
            part.cache.clear()
    with growth_of(network.device) as growth:
        again()
    weights = {id(tensor): tensor for tensor in (*network.module.parameters(), *network.module.buffers())}
    return sum(weight.nbytes for weight in weights.values()) + growth[0]


@contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Let torch use this many threads for a while; all it has when None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def growth_of(device: torch.device) -> Iterator[list[int]]:
    """Put into the yielded list, at the end, how many bytes of tensors there were at most beyond those that were there before."""
    grown = [0]
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        taken = torch.accelerator.memory_allocated(device)
        yield grown
        grown[0] = torch.accelerator.max_memory_allocated(device) - taken
        return
    # Pages of the process depend on what it freed before; what torch allocates does not.
    with _quiet_profiler(), profile(use_device=None, profile_memory=True) as profiler:
        yield grown
    events = profiler.kineto_results.events() if profiler.kineto_results is not None else []
    allocations = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    grown[0] = max(accumulate((event.nbytes() for event in allocations), initial=0))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    before = os.environ.get(_QUIET)
    os.environ.setdefault(_QUIET, "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_QUIET, None)
