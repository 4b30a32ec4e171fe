"""The latents after each step of a pipeline's own sampler, and the seconds that all steps take.

Unlike a replay it asks nothing of the pipeline but a sampler, so that guidance in calls of its own and noise on the way are fine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from aerogel.data.denoising import Denoising, denoised
from aerogel.errors import AerogelError
from aerogel.kernels.synchronized_clock import now


@contextmanager
def watched_sampler(pipeline: Any, passed: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `passed` with the latents behind each step of the pipeline's sampler for a while."""
    scheduler = pipeline.scheduler
    own, before = scheduler.step, scheduler.__dict__.get("step")

    @functools.wraps(own)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        passed(made[0].detach())
        return made

    scheduler.__dict__["step"] = step
    try:
        yield
    finally:
        del scheduler.__dict__["step"]
        if before is not None:
            scheduler.__dict__["step"] = before


def latents_by_step(pipeline: Any, wanted: Denoising, seed: int) -> Iterator[list[Tensor]]:
    """Make images and yield, batch after batch, the latents behind each step, on the CPU."""
    passed: list[Tensor] = []
    with watched_sampler(pipeline, passed.append):
        for _ in denoised(pipeline, wanted, seed):
            yield [latents.cpu() for latents in passed]
            passed.clear()


def denoising_seconds(pipeline: Any, denoiser: nn.Module, wanted: Denoising, seed: int, clock: Callable[[], float]) -> float:
    """Make images and return the seconds from the denoiser's first forward to the end of the sampler's last step, all batches together.

    Raises AerogelError for a sampler that does not make a step for each of its time steps.
    """
    device = next(denoiser.parameters()).device
    starts: list[float] = []
    ends: list[float] = []
    behind = 0

    def begin(*_: Any) -> None:
        if len(starts) == len(ends):
            starts.append(now(device, clock))

    def passed(_: Tensor) -> None:
        nonlocal behind
        behind += 1
        if behind == len(pipeline.scheduler.timesteps):
            ends.append(now(device, clock))
            behind = 0

    handle = denoiser.register_forward_pre_hook(begin, prepend=True)
    try:
        with watched_sampler(pipeline, passed):
            for _ in denoised(pipeline, wanted, seed):
                pass
    finally:
        handle.remove()
    if behind or not ends or len(starts) != len(ends):
        raise AerogelError(
            f"{type(pipeline.scheduler).__name__} has {len(pipeline.scheduler.timesteps)} time steps, but made another number of steps: "
            "its denoising cannot be timed"
        )
    return sum(end - start for start, end in zip(starts, ends, strict=True))
