"""Fair timing: networks take turns in one process, and memory is what the weights need and what the process grew by."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from aerogel.evaluate.measure import Measure
from aerogel.model.network import Network

PROCESS_STATUS = Path("/proc/self/status")
"""File in which Linux tells the memory of this process."""
_PAGE = 4096
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


def weights_of(network: Network) -> list[Tensor]:
    """All tensors of a network, each read once, so that pages mapped from files are in memory before growth is measured."""
    weights = list({id(tensor): tensor for tensor in (*network.module.parameters(), *network.module.buffers())}.values())
    for weight in weights:
        if type(weight) in (Tensor, nn.Parameter):  # tensors of other libraries cannot always be looked at this way
            weight.detach().flatten()[:: max(_PAGE // weight.element_size(), 1)].clone()
    return weights


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
    """Put into the yielded list, at the end, by how many bytes memory grew at most; 0 where the system does not tell."""
    grown = [0]
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        taken = torch.accelerator.memory_allocated(device)
        yield grown
        grown[0] = torch.accelerator.max_memory_allocated(device) - taken
        return
    before = _resident("VmRSS")
    with suppress(OSError):  # where it is refused, the peak of the whole process is what is told
        Path("/proc/self/clear_refs").write_text("5")
    yield grown
    grown[0] = max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", PROCESS_STATUS.read_text() if PROCESS_STATUS.exists() else "", re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
