"""Images that a pipeline makes, and the calls its denoiser gets meanwhile: every step and guidance branch of the real sampler."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model import calls
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, temporary_hooks, until


@dataclass(frozen=True)
class Denoising:
    """Images that a pipeline generates."""

    count: int = 64
    """Images; their noise differs, their prompts or labels take turns."""
    steps: int = 20
    """Steps of the sampler: those that the denoiser will be used with."""
    guidance: float | None = None
    """Guidance scale; None leaves the pipeline's own."""
    prompts: tuple[str, ...] = ()
    """Requests to text-to-image pipelines."""
    batch: int = 8
    """Images made at once; a call has twice as many samples under guidance."""
    height: int | None = None
    """Pixels; None leaves the pipeline's own."""
    width: int | None = None
    """Pixels; None leaves the pipeline's own."""
    num_frames: int | None = None
    """Frames of a video; None leaves the pipeline's own."""


class ImageBatch(NamedTuple):
    """Images that were made at once."""

    images_NCHW: Tensor
    """Pixels from 0 to 1, float32 on the CPU."""
    subjects: tuple[str, ...]
    """The prompt or the name of the class of each; empty where the pipeline takes neither."""


def record(pipeline: Any, denoiser: nn.Module, wanted: Denoising, seed: int = 0) -> list[Call]:
    """Make the images and return every call that the denoiser got, in order; tensors that stay the same share their memory.

    Raises AerogelError when the pipeline needs something that is not given.
    """
    runs = [run.make for run in _runs(pipeline, wanted, seed, "latent")]
    with _quiet(pipeline):
        return calls.record(denoiser, runs)


def check(pipeline: Any, wanted: Denoising) -> None:
    """Raise AerogelError, without running anything, where the pipeline needs something that is not given, or does not take what is."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    if wanted.prompts and "prompt" not in takes:
        made = "of classes" if "class_labels" in takes else "without being asked for anything"
        raise AerogelError(f"{type(pipeline).__name__} takes no prompts, it makes images {made}; leave the prompts out")
    _subjects(pipeline, wanted, takes)
    _settings(pipeline, wanted, takes)


def first_call(pipeline: Any, denoiser: nn.Module, wanted: Denoising, seed: int = 0) -> Call:
    """Return the first call that the denoiser gets for one image, without running it.

    Raises AerogelError when the pipeline needs something that is not given.
    """
    stop, found = Stop(), list[Call]()

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs).map(lambda tensor: tensor.detach().to("cpu", copy=True)))
        raise stop

    handle = denoiser.register_forward_pre_hook(take, with_kwargs=True)
    with temporary_hooks([handle]), _quiet(pipeline), until(stop):
        next(_runs(pipeline, replace(wanted, count=1, batch=1), seed, "latent")).make()
    return found[0]


def generate_images(pipeline: Any, wanted: Denoising, seed: int = 0) -> Iterator[ImageBatch]:
    """Make the images, batch after batch: those that `record` with the same seed watches.

    Raises AerogelError when the pipeline needs something that is not given.
    """
    for run in _runs(pipeline, wanted, seed, "pt"):
        with _quiet(pipeline), torch.no_grad():
            made = run.make().images
        # Some pipelines know "pt", others take it for "not PIL" and answer with arrays of (N, H, W, C).
        images_NCHW = made if isinstance(made, Tensor) else torch.from_numpy(made).permute(0, 3, 1, 2)
        yield ImageBatch(images_NCHW.detach().float().cpu().contiguous(), run.subjects)


def denoised(pipeline: Any, wanted: Denoising, seed: int = 0) -> Iterator[tuple[str, ...]]:
    """Make the same images as far as latents where the pipeline can stop there; yields the subjects of each batch once it is made.

    Raises AerogelError when the pipeline needs something that is not given.
    """
    for run in _runs(pipeline, wanted, seed, "latent"):
        with _quiet(pipeline), torch.no_grad():
            run.make()
        yield run.subjects


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """The pipeline without its progress bars."""
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


def _settings(pipeline: Any, wanted: Denoising, takes: Any) -> dict[str, Any]:
    """The arguments for what is not left to the pipeline; raises AerogelError for one that it does not take."""
    given = {"guidance_scale": wanted.guidance, "height": wanted.height, "width": wanted.width, "num_frames": wanted.num_frames}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in takes:
            raise AerogelError(f"{type(pipeline).__name__} knows no {name}; leave it out")
    return given


class _Run(NamedTuple):
    """One call of a pipeline."""

    make: Callable[[], Any]
    subjects: tuple[str, ...]


def _runs(pipeline: Any, wanted: Denoising, seed: int, output: str) -> Iterator[_Run]:
    """The pipeline's calls, one for each batch of images."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    subjects = _subjects(pipeline, wanted, takes)
    fixed: dict[str, Any] = {"num_inference_steps": wanted.steps, "output_type": output if "latents" in takes else "pt"}
    fixed |= _settings(pipeline, wanted, takes)
    for start in range(0, wanted.count, wanted.batch):
        numbers = range(start, min(start + wanted.batch, wanted.count))
        generator = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        asked: dict[str, Any] = {name: [values[number % len(values)] for number in numbers] for name, values in subjects.items()}
        names = tuple(_name(pipeline, value) for values in asked.values() for value in values)
        asked = asked or {"batch_size": len(numbers)}
        yield _Run(partial(_call, pipeline, **asked, generator=generator, **fixed), names)


def _call(pipeline: Any, **given: Any) -> Any:
    """Call the pipeline; raises AerogelError for values of its configuration that it only minds then, as schedulers do."""
    try:
        return pipeline(**given)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError) as error:
        if isinstance(error, AerogelError) or _is_ours(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(
            f"{type(pipeline).__name__} fails ({type(error).__name__}: {reason}); where its configuration is damaged, for example that of "
            "its scheduler, fetch it again"
        ) from error


def _is_ours(error: Exception) -> bool:
    """Return True where code of this package raised it, which watches the denoiser meanwhile."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: str = frame.f_globals.get("__name__", "")
    return module != __name__ and module.partition(".")[0] == __name__.partition(".")[0]


def _name(pipeline: Any, subject: Any) -> str:
    """A prompt as it is, a class by the first of its names."""
    if isinstance(subject, str):
        return subject
    return next((name for name, number in getattr(pipeline, "labels", {}).items() if number == subject), str(subject))


def _subjects(pipeline: Any, wanted: Denoising, takes: Any) -> dict[str, Sequence[Any]]:
    """Return the prompts or classes of the images; raises AerogelError for prompts that are missing."""
    if "class_labels" in takes:
        return {"class_labels": sorted(set(getattr(pipeline, "labels", {}).values())) or [0]}
    if "prompt" in takes:
        if not wanted.prompts:
            raise AerogelError(f"{type(pipeline).__name__} makes images of prompts: give some as `prompts`")
        return {"prompt": wanted.prompts}
    if "batch_size" in takes:
        return {}
    raise AerogelError(f"do not know what to ask {type(pipeline).__name__} for; record its denoiser's calls and give them as samples")
