"""Speed of pipelines that generate images, side by side in one process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from aerogel.data import denoising
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import pipeline_of
from aerogel.evaluate.timing import Facts, Timed, peak_memory, take_turns
from aerogel.kernels.synchronized_clock import now
from aerogel.model.network import Network
from aerogel.options import Batch, Count, Guidance, Threads


@dataclass(frozen=True)
class Sampling(Timed):
    """Images a minute and the time of one run of the denoiser, wall-clock, and peak memory.

    Networks take turns round after round (A B A B), so that a busy machine slows all of them alike; figures are medians, and speed-ups are
    medians of the ratios within a round. The whole pipeline runs: text encoder, sampler, denoiser and decoder.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    batch: Batch = 1
    """Images at once."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: Guidance | None = None
    """Guidance scale; None leaves the pipeline's own."""
    prompts: tuple[str, ...] = ("photo",)
    """Prompts for text-to-image pipelines."""
    rounds: Count = 3
    """Timed rounds of each model, after two that warm up."""
    threads: Threads | None = None
    """Threads that torch may use; all it has when None."""

    def compare(self, networks: dict[str, Network]) -> Facts:
        """Return for each name images a minute, milliseconds of a denoiser's run, peak memory and the settings.

        `speedup` and `denoiser_speedup` are over the first network. Peak memory is the weights of the denoiser and the most that other
        tensors took while the pipeline ran. Raises AerogelError for a network without a pipeline, or when the pipeline needs what is not
        given.
        """
        if min(self.batch, self.steps, self.rounds) < 1:
            raise AerogelError(f"batch {self.batch}, steps {self.steps}, rounds {self.rounds}: each is at least 1")
        return take_turns(lambda _, network: _Runner(network, self), networks, self.rounds, self.threads)


class _Runner:
    """One network's turns."""

    def __init__(self, network: Network, options: Sampling) -> None:
        self.network, self.options = network, options
        self.pipeline = pipeline_of(network)
        self.wanted = Denoising(options.batch, options.steps, options.guidance, tuple(options.prompts), options.batch)
        self.images: list[float] = []
        """Seconds of each turn."""
        self.forwards: list[float] = []
        """The median run of the denoiser in each turn, in seconds."""
        self.peak_bytes = 0

    def warm(self) -> None:
        """The turn in which kernels are chosen and weights packed; memory grows to its peak here."""
        self.peak_bytes = peak_memory(self.network, self._make, self._make)

    def turn(self) -> None:
        """One turn that counts."""
        whole, forwards = self._make()
        self.images.append(whole)
        self.forwards.append(statistics.median(forwards))

    def facts(self, first: _Runner) -> dict[str, Any]:
        """Summarize the rounds."""
        options = self.options
        return {
            "images_per_minute": 60 * options.batch / statistics.median(self.images),
            "denoiser_milliseconds": 1000 * statistics.median(self.forwards),
            "speedup": statistics.median(a / b for a, b in zip(first.images, self.images, strict=True)),
            "denoiser_speedup": statistics.median(a / b for a, b in zip(first.forwards, self.forwards, strict=True)),
            "peak_memory_bytes": self.peak_bytes,
            "batch": options.batch,
            "steps": options.steps,
            "guidance": options.guidance,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "device": str(self.network.device),
        }

    def _make(self) -> tuple[float, list[float]]:
        """Seconds of a pipeline's run, and of each run of its denoiser."""
        starts: list[float] = []
        taken: list[float] = []
        denoiser, clock = self.network.module, partial(now, self.network.device)
        hooks = [
            denoiser.register_forward_pre_hook(lambda *_: starts.append(clock()), prepend=True),
            denoiser.register_forward_hook(lambda *_: taken.append(clock() - starts[-1])),
        ]
        try:
            start = clock()
            for _ in denoising.generate_images(self.pipeline, self.wanted):
                pass
            return clock() - start, taken
        finally:
            for hook in hooks:
                hook.remove()
