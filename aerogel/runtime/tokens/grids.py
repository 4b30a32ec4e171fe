"""Grids of the images in a forward: which tokens of a row are one image, and how many rows and columns it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.errors import AerogelError


class Grid(NamedTuple):
    """One image."""

    row: int
    """Row of the batch."""
    place_P: Tensor
    """Positions of its tokens, row by row of the image."""
    height: int
    width: int


def grids_of(vision_BN: Tensor, inputs: Mapping[str, Any]) -> Iterator[Grid]:
    """Yield the images of a forward, by its tokens of images and its arguments; tokens in a row without text between are one image.

    Sides are those of `image_grid_thw` where the model's forward gets that, divided by what merges patches; else images are squares. Raises
    AerogelError for other images.
    """
    given = inputs.get("image_grid_thw")
    shapes = iter([] if given is None else given.tolist())
    for row, vision_N in enumerate(vision_BN):
        place_V = vision_N.nonzero()[:, 0]
        ends = ((place_V.diff() > 1).nonzero()[:, 0] + 1).tolist()
        for place_P in place_V.tensor_split(ends) if len(place_V) else ():
            yield Grid(row, place_P, *_sides(len(place_P), next(shapes, None)))


def repeated(grid_N3: Tensor, vision_BN: Tensor) -> Tensor:
    """Return a grid of images with those of each row as often as the row is there behind itself, as with beams."""
    starts_BN = vision_BN & ~vision_BN.roll(1, dims=1)
    starts_BN[:, 0] = vision_BN[:, 0]
    images_B = starts_BN.sum(1)
    copies, over = divmod(int(images_B.sum()), len(grid_N3))
    if copies < 2 or over or int(images_B[::copies].sum()) != len(grid_N3):
        return grid_N3
    return torch.cat([part for part in grid_N3.split(images_B[::copies].tolist()) for _ in range(copies)])


def _sides(tokens: int, shape: list[int] | None) -> tuple[int, int]:
    if shape is None:
        side = round(tokens**0.5)
        height, width = side, side
    else:
        merge = round((shape[0] * shape[1] * shape[2] / tokens) ** 0.5)
        height, width = shape[0] * shape[1] // merge, shape[2] // merge
    if height * width != tokens:
        raise AerogelError(f"an image of {tokens} tokens is no grid of {height} x {width}; choose a rule that needs no grid")
    return height, width
