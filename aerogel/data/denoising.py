"""Calls of a denoiser, recorded while its pipeline makes pictures: every step and guidance branch of one pass of the real sampler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model import calls
from aerogel.model.calls import Call


@dataclass(frozen=True)
class Denoising:
    """Which pictures a denoiser is watched making."""

    count: int = 64
    """Pictures; their noise differs, their prompts or labels take turns."""
    steps: int = 20
    """Steps of the sampler: those that the denoiser will be used with."""
    guidance: float | None = None
    """Guidance scale; None leaves the pipeline's own."""
    prompts: tuple[str, ...] = ()
    """What text-to-image pipelines are asked for."""
    batch: int = 8
    """Pictures made at once; a call has twice as many samples under guidance."""


def record(pipeline: Any, denoiser: nn.Module, wanted: Denoising, seed: int = 0) -> list[Call]:
    """Make the pictures and return every call that the denoiser got, in order; tensors that stay the same share their memory.

    Raises AerogelError when the pipeline needs something that is not given.
    """
    runs = list(_runs(pipeline, wanted, seed))
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        return calls.record(denoiser, runs)
    finally:
        pipeline.set_progress_bar_config(**shown)


def _runs(pipeline: Any, wanted: Denoising, seed: int) -> Iterator[Callable[[], object]]:
    """The pipeline's calls, one for each batch of pictures."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    subjects = _subjects(pipeline, wanted, takes)
    fixed: dict[str, Any] = {"num_inference_steps": wanted.steps, "output_type": "latent" if "latents" in takes else "pt"}
    if wanted.guidance is not None:
        if "guidance_scale" not in takes:
            raise AerogelError(f"{type(pipeline).__name__} knows no guidance; leave it out")
        fixed["guidance_scale"] = wanted.guidance
    for start in range(0, wanted.count, wanted.batch):
        numbers = range(start, min(start + wanted.batch, wanted.count))
        generator = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        asked: dict[str, Any] = {name: [values[number % len(values)] for number in numbers] for name, values in subjects.items()}
        yield partial(pipeline, **asked, **({} if asked else {"batch_size": len(numbers)}), generator=generator, **fixed)


def _subjects(pipeline: Any, wanted: Denoising, takes: Any) -> dict[str, Sequence[Any]]:
    if "class_labels" in takes:
        return {"class_labels": sorted(set(getattr(pipeline, "labels", {}).values())) or [0]}
    if "prompt" in takes:
        if not wanted.prompts:
            raise AerogelError(f"{type(pipeline).__name__} makes pictures of prompts: give some, Denoising(prompts=(...))")
        return {"prompt": wanted.prompts}
    if "batch_size" in takes:
        return {}
    raise AerogelError(f"do not know what to ask {type(pipeline).__name__} for; record its denoiser's calls and give them as samples")
