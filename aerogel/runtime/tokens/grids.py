"""Grids of the images in a forward: which tokens of a row are one image, or one frame, and how many rows and columns it has.

B rows, N positions, P tokens of an image or a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.errors import AerogelError

_GRIDS = {False: "image_grid_thw", True: "video_grid_thw"}
"""Inputs with frames, rows and columns of patches of each image, and of each video."""


class Grid(NamedTuple):
    """One image, or one frame of a video."""

    row: int
    """Row of the batch."""
    place_P: Tensor
    """Positions of its tokens, row by row of the image."""
    height: int
    width: int


class _Run(NamedTuple):
    """Tokens of images, or of videos, without text between."""

    row: int
    parts: tuple[Tensor, ...]
    """Positions between separators."""
    video: bool

    @property
    def place_V(self) -> Tensor:  # noqa: N802
        """Positions of all its tokens."""
        return torch.cat(self.parts)


def grids_of(
    vision_BN: Tensor, inputs: Mapping[str, Any], separator_BN: Tensor | None = None, video_BN: Tensor | None = None
) -> Iterator[Grid]:
    """Yield the images of a forward, and the frames of its videos, by its tokens of images and its arguments.

    Tokens in a row without text between are one image, or one image of tiles behind the whole image, where separators end the rows.
    Sides are those of positions with axes for rows and columns, as `generate` hands them on, or of `image_grid_thw` and `video_grid_thw`
    divided by what merges patches; without either, images are squares. Raises AerogelError for other images, and for other videos.
    """
    runs = list(_runs(vision_BN, separator_BN, video_BN))
    sides = {video: _sides([run for run in runs if run.video == video], inputs.get(name)) for video, name in _GRIDS.items()}
    position_ABN = inputs.get("position_ids")
    for run in runs:
        if isinstance(position_ABN, Tensor) and position_ABN.ndim == 3 and len(position_ABN) >= 3:
            side = len(position_ABN[-2, run.row, run.place_V].unique()), len(position_ABN[-1, run.row, run.place_V].unique())
            yield from _frames(run, repeat(side))
        elif (of_kind := sides[run.video]) is not None:
            yield from _frames(run, of_kind)
        elif run.video:
            raise AerogelError(f"a video of {len(run.place_V):,} tokens comes without its grid; choose a rule that needs no grid")
        else:
            yield from _squares(run)


def _runs(vision_BN: Tensor, separator_BN: Tensor | None, video_BN: Tensor | None) -> Iterator[_Run]:
    """Runs in the order of rows and positions."""
    separator_BN = torch.zeros_like(vision_BN) if separator_BN is None else separator_BN
    video_BN = torch.zeros_like(vision_BN) if video_BN is None else video_BN
    for row, (vision_N, separator_N, video_N) in enumerate(zip(vision_BN, separator_BN, video_BN, strict=True)):
        place_V = (vision_N | separator_N).nonzero()[:, 0]
        ends_V = (place_V.diff() > 1) | (video_N[place_V].diff() != 0)
        for place_P in place_V.tensor_split((ends_V.nonzero()[:, 0] + 1).tolist()) if len(place_V) else ():
            lines = place_P.tensor_split((separator_N[place_P].nonzero()[:, 0] + 1).tolist())
            parts = tuple(line[~separator_N[line]] for line in lines)
            if parts := tuple(part for part in parts if len(part)):
                yield _Run(row, parts, bool(video_N[place_P[0]]))


def _sides(runs: list[_Run], grid_N3: Tensor | None) -> Iterator[tuple[int, int]] | None:
    """Rows and columns of tokens of each frame in turn, by a grid of frames, rows and columns of patches; None without one."""
    if grid_N3 is None or not runs:
        return None
    merge = round(sum(map(prod, grid_N3.tolist())) / sum(len(run.place_V) for run in runs)) ** 0.5
    return iter([(int(height / merge), int(width / merge)) for frames, height, width in grid_N3.tolist() for _ in range(frames)])


def _frames(run: _Run, sides: Iterator[tuple[int, int]]) -> Iterator[Grid]:
    """Frames of these sides, one behind the other; an image is one."""
    place_V = run.place_V
    while len(place_V):
        height, width = next(sides, (0, 0))
        if not 0 < height * width <= len(place_V):
            raise _no_grid(len(place_V), height, width)
        yield Grid(run.row, place_V[: height * width], height, width)
        place_V = place_V[height * width :]


def _squares(run: _Run) -> Iterator[Grid]:
    """A square image; or the whole image as a square and a grid of tiles, whose first line has no separator before it."""
    parts = list(run.parts)
    while parts:
        first = parts.pop(0)
        width = len(parts[0]) if parts else 0
        whole = len(first) - width if 0 < width < len(first) else len(first)
        side = isqrt(whole)
        if side**2 != whole:
            raise _no_grid(whole, side, side)
        yield Grid(run.row, first[:whole], side, side)
        if whole < len(first):
            lines = [first[whole:]]
            while parts and len(parts[0]) == width:
                lines.append(parts.pop(0))
            yield Grid(run.row, torch.cat(lines), len(lines), width)


def _no_grid(tokens: int, height: int, width: int) -> AerogelError:
    return AerogelError(f"an image of {tokens} tokens is no grid of {height} x {width}; choose a rule that needs no grid")
