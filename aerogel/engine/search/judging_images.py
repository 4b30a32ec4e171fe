"""Cost of a caching policy: images of held-out noise under it against those of the whole denoiser, step by step.

T steps, N modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.data import denoising
from aerogel.data.denoising import Denoising
from aerogel.data.latents import latents_by_step, watched_sampler
from aerogel.engine.stages import seeded
from aerogel.evaluate.image_similarity import png
from aerogel.model.calls import tensors_in
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of

SHOWN = 8
"""Images that are kept for the report."""

On = Callable[[], AbstractContextManager[Any]]
"""Puts a policy on for a while."""


class Judge:
    """The whole network's own trajectories, and what others are held against them."""

    def __init__(self, network: Network, wanted: Denoising, seed: int) -> None:
        self.network, self.wanted, self.seed = network, wanted, seed
        self.modules = tuple(cached_modules_of(network))
        with self._reading() as read_TN, seeded(seed):
            self._exact = list(latents_by_step(network.processor, wanted, seed))
        self._read_TN = read_TN[0]
        self.steps = [float(step) for step in network.processor.scheduler.timesteps]
        self.images, self.subjects = self._painted()

    @property
    def variance(self) -> float:
        """Of the final latents: what an error is to be compared with."""
        return float(torch.cat([passed[-1].flatten().float() for passed in self._exact]).var())

    def policy(self, on: On) -> dict[str, Any]:
        """The error behind each step and at the end, the share of each module's work that was done, and images."""
        with self._reading() as read_TN, on():
            errors = self._errors(self.wanted)
        done_TN = torch.where(self._read_TN > 0, read_TN[0] / self._read_TN.clamp(min=1), 1.0)
        made, _ = self._painted(on)
        return {
            "error": errors[-1],
            "step_errors": errors,
            "ran": [[round(share, 4) for share in row] for row in done_TN.tolist()],
            "images": made,
        }

    def fewer(self, steps: int) -> dict[str, Any]:
        """The error at the end and images of the whole network with fewer steps."""
        made, _ = self._painted(steps=steps)
        return {"error": self._errors(replace(self.wanted, steps=steps))[-1], "images": made}

    def _errors(self, wanted: Denoising) -> list[float]:
        """Mean squared errors behind each step; with other steps, at the end alone."""
        squares: list[float] = []
        values = 0
        with seeded(self.seed):
            for exact, passed in zip(self._exact, latents_by_step(self.network.processor, wanted, self.seed), strict=True):
                pairs = list(zip(exact, passed, strict=True)) if len(exact) == len(passed) else [(exact[-1], passed[-1])]
                found = [float((a.double() - b.double()).square().sum()) for a, b in pairs]
                squares = [before + now for before, now in zip(squares or [0.0] * len(found), found, strict=True)]
                values += exact[-1].numel()
        return [square / values for square in squares]

    def _painted(self, on: On = nullcontext, steps: int | None = None) -> tuple[list[str], list[str]]:
        """The first images as PNG in base64, and what they show; none of videos."""
        if self.network.family.modality != "image":
            return [], []
        wanted = replace(self.wanted, count=min(SHOWN, self.wanted.count), steps=steps or self.wanted.steps)
        with seeded(self.seed), on():
            made = list(denoising.generate_images(self.network.processor, wanted, self.seed))
        images = [png(image_CHW.nan_to_num(0.0)) for batch in made for image_CHW in batch.images_NCHW]
        return images, [subject for batch in made for subject in batch.subjects]

    @contextmanager
    def _reading(self) -> Iterator[list[Tensor]]:
        """Count the numbers that each module reads at each step; the table (T, N) is in the yielded list at the end."""
        find, scheduler = self.network.module.get_submodule, self.network.processor.scheduler
        read: dict[tuple[int, int], int] = {}
        behind = [0]

        def count(place: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            entry = (behind[0] % len(scheduler.timesteps), place)
            read[entry] = read.get(entry, 0) + tensors_in((args, kwargs))[0].numel()
            return own(*args, **kwargs)

        def step(_: Tensor) -> None:
            behind[0] += 1

        answers: dict[nn.Module, Callable[..., Any]] = {
            find(name): partial(count, place, find(name).forward) for place, name in enumerate(self.modules)
        }
        found: list[Tensor] = []
        with patch_forward(answers), watched_sampler(self.network.processor, step):
            yield found
        table_TN = torch.zeros(len(scheduler.timesteps), len(self.modules), dtype=torch.float64)
        for entry, count_of in read.items():
            table_TN[entry] = count_of
        found.append(table_TN)
