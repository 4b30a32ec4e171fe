"""Every denoiser of diffusers that is built here, tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aerogel.model.calls import Call
from tests.architectures import denoisers_audio, denoisers_control, denoisers_image, denoisers_unet, denoisers_video, weights
from tests.architectures.draws import Denoiser, Draw

DENOISERS: dict[str, Denoiser] = (
    denoisers_image.DENOISERS
    | denoisers_video.DENOISERS
    | denoisers_audio.DENOISERS
    | denoisers_unet.DENOISERS
    | denoisers_control.DENOISERS
)
TYPES: tuple[str, ...] = tuple(sorted(DENOISERS))
"""Classes of diffusers; what follows a hyphen names another configuration of a class."""


def build(name: str, seed: int = 0) -> nn.Module:
    """Build the denoiser of a name, the same for the same seed."""
    import diffusers

    denoiser = DENOISERS[name]
    model_class: Any = getattr(diffusers, denoiser.class_name or name)
    return weights.build(lambda: model_class(**denoiser.options), seed)


def calls(name: str) -> list[Call]:
    """Return two forwards: two images with a prompt of seven tokens, and one image with a shorter prompt."""
    denoiser, generator = DENOISERS[name], torch.Generator().manual_seed(0)
    shapes = ((2, denoiser.tokens or 7), (1, denoiser.tokens or 5))
    return [Call((), denoiser.inputs(Draw(batch, tokens, generator))) for batch, tokens in shapes]
