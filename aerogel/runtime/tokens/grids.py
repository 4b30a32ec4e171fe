"""Grids of the images in a forward: which tokens of a row are one image, and how many rows and columns it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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

    Sides are those of positions with axes for rows and columns, as `generate` hands them on, or of `image_grid_thw` divided by what merges
    patches; without either, images are squares. Raises AerogelError for other images.
    """
    shapes = iter([] if inputs.get("image_grid_thw") is None else inputs["image_grid_thw"].tolist())
    position_ABN = inputs.get("position_ids")
    for row, vision_N in enumerate(vision_BN):
        place_V = vision_N.nonzero()[:, 0]
        ends = ((place_V.diff() > 1).nonzero()[:, 0] + 1).tolist()
        for place_P in place_V.tensor_split(ends) if len(place_V) else ():
            if isinstance(position_ABN, Tensor) and position_ABN.ndim == 3 and len(position_ABN) >= 3:
                height, width = (len(position_ABN[axis, row, place_P].unique()) for axis in (-2, -1))
            else:
                height, width = _sides(len(place_P), next(shapes, None))
            if height * width != len(place_P):
                raise AerogelError(f"an image of {len(place_P)} tokens is no grid of {height} x {width}; choose a rule that needs no grid")
            yield Grid(row, place_P, height, width)


def _sides(tokens: int, shape: list[int] | None) -> tuple[int, int]:
    if shape is None:
        return round(tokens**0.5), round(tokens**0.5)
    merge = round((shape[0] * shape[1] * shape[2] / tokens) ** 0.5)
    return shape[0] * shape[1] // merge, shape[2] // merge
