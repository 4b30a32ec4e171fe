"""Images of the network beside those that its original makes from the same noise."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.evaluate import features
from aerogel.evaluate.measure import ImageMeasure, original_of
from aerogel.model.network import Network
from aerogel.numerics.images import psnr, ssim
from aerogel.options import CountOrZero

LARGEST = 256
"""Pixels along the longer side of an image that is kept; larger ones are made smaller."""


@dataclass(frozen=True)
class ImageSimilarity(ImageMeasure):
    """Distance of images from the original's of the same seed: MSE, PSNR, SSIM and a perceptual distance.

    Pixels are from 0 to 1. MSE is the mean over all images, PSNR is that of this mean, SSIM (11 x 11 Gaussian window) and the
    perceptual distance are means over images. The latter compares feature maps of several depths as LPIPS does (arXiv:1801.03924),
    but with channel weights of 1 instead of learned ones. An image can be as good and yet another one: see `realism`.
    """

    compares: ClassVar[bool] = True

    kept: CountOrZero = 8
    """Pairs of images that the record keeps for the report."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return mse, psnr (decibels), ssim, perceptual[NETWORK, unlearned], how images were made, and a few pairs as PNG in base64."""
        judge, original = features.load(self.features, network.device), original_of(self, against)
        errors: list[Tensor] = []
        alike: list[Tensor] = []
        distances: list[Tensor] = []
        pairs: list[dict[str, str]] = []
        for theirs, ours in zip(self.generated(original), self.generated(network), strict=True):
            if theirs.images_NCHW.shape != ours.images_NCHW.shape:
                shapes = [tuple(made.images_NCHW.shape[1:]) for made in (theirs, ours)]
                raise AerogelError(f"the original makes images of {shapes[0]} and the model of {shapes[1]}; compare equal images")
            errors.append((theirs.images_NCHW - ours.images_NCHW).double().square().mean((1, 2, 3)))
            alike.append(ssim(theirs.images_NCHW, ours.images_NCHW))
            distances.append(features.distance(judge.look(theirs.images_NCHW), judge.look(ours.images_NCHW)))
            named = ours.subjects or ("",) * len(ours.images_NCHW)
            for subject, before, after in zip(named, theirs.images_NCHW, ours.images_NCHW, strict=True):
                if len(pairs) < self.kept:
                    pairs.append({"subject": subject, "original": png(before), "compressed": png(after)})
        mse = float(torch.cat(errors).mean())
        return {
            "mse": mse,
            "psnr": psnr(mse),
            "ssim": float(torch.cat(alike).mean()),
            f"perceptual[{judge.name}, unlearned]": float(torch.cat(distances).mean()),
            **self.conditions,
            "pairs": pairs,
        }


def png(image_CHW: Tensor) -> str:
    """Return an image in [0, 1] of one or three channels as a PNG in base64, at most 256 pixels long."""
    from PIL import Image

    shades_HWC = (image_CHW * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    drawn = Image.fromarray(shades_HWC.squeeze(2).numpy() if len(image_CHW) == 1 else shades_HWC.contiguous().numpy())
    drawn.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
