"""Looks at a trained pipeline: `python zoo/sample.py zoo/fashion-unet` draws images of every class and asks the judge what they show."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fashion
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification

JUDGE = Path(__file__).parent / "fashion-judge"


def images(pipeline: Any, label: int, count: int, steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Return `count` images of a class (N, 1, H, W) in [-1, 1]; the same seed gives the same noise for every class."""
    subject = {"class_labels": [label] * count} if hasattr(pipeline, "labels") else {"prompt": [fashion.CLASSES[label]] * count}
    generator = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in range(count)]
    made = pipeline(**subject, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt").images
    return made.float() * 2 - 1


@torch.no_grad()
def verdicts(images: Tensor) -> Tensor:
    """Return the class that the judge sees in each image."""
    judge = AutoModelForImageClassification.from_pretrained(JUDGE, dtype=torch.float32).eval()
    seen: Tensor = judge(images).logits.argmax(-1)
    return seen


def grid(images_KN: list[Tensor]) -> Image.Image:
    """Draw rows of images, twice their size."""
    rows = [np.concatenate([np.asarray(image[0]) for image in row], axis=1) for row in images_KN]
    shades = ((np.concatenate(rows) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return Image.fromarray(shades).resize((2 * shades.shape[1], 2 * shades.shape[0]), Image.Resampling.NEAREST)


def main() -> None:
    """Make the images, draw the first of each class, and print how often the judge sees what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    for name, default in {"each": 20, "steps": 20, "drawn": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--image", type=Path, help="Where to draw the grid.")
    given = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(given.pipeline, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = [images(pipeline, label, given.each, given.steps, given.guidance) for label in range(len(fashion.CLASSES))]
    right = {
        name: float((verdicts(images) == label).float().mean())
        for label, (name, images) in enumerate(zip(fashion.CLASSES, made, strict=True))
    }
    print(json.dumps({"agreement": sum(right.values()) / len(right), "by class": right}, indent=1))
    if given.image:
        grid([images[: given.drawn] for images in made]).save(given.image, optimize=True)


if __name__ == "__main__":
    main()
