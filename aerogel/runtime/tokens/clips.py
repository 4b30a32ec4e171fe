"""Clips among the tokens of a forward: which positions are the places of which frame.

B rows, K positions before a block, F frames, P places of a frame, V positions of videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.runtime.tokens.stage import Stage
from aerogel.runtime.tokens.vision_tower import TowerPass

GRID = "video_grid_thw"
"""Input of models of the Qwen-VL families: frames, rows and columns of patches of each video. Their vision tower is given it; `generate` of
transformers runs that first, and does not hand the grid on to the model."""


class Clip(NamedTuple):
    """A video of a row."""

    row: int
    at_FP: Tensor
    """Numbers of its positions."""
    number: int
    """Its number among those that the vision tower read; rows of several beams share one."""


def clips_of(stage: Stage, frames: int) -> list[Clip]:
    """Return the clips before the first block: by the grid that the vision tower was given, else by a number of frames of equal size.

    Without a grid, the tokens of each row that stand for a video, or for images where the forward has none of videos, are one clip; one
    position behind its frames may be left over, a separator. Raises AerogelError where neither fits.
    """
    video_BK = stage.kept.rows(stage.video_BN) & stage.vision_BK
    has_video = bool(video_BK.any())
    if has_video and stage.tower is not None and stage.tower.grid_N3 is not None:
        return _by_grid(video_BK, stage.tower)
    if not frames:
        if has_video:
            raise AerogelError(
                "the vision tower of this model is given no grid of a video; say by the option frames how many frames it has"
            )
        return []
    rows = [row_K.nonzero()[:, 0] for row_K in (video_BK if has_video else stage.vision_BK)]
    copies = _copies(stage, frames)
    return [_in_frames(row, at_V, frames, row // copies) for row, at_V in enumerate(rows) if len(at_V)]


def _by_grid(video_BK: Tensor, seen: TowerPass) -> list[Clip]:
    """Clips in the order of the grid; a video's tokens follow each other, what stands between them aside.

    Rows may be there several times in a row, for beams.
    """
    assert seen.grid_N3 is not None
    sizes = seen.tower.tokens(seen.grid_N3)
    copies, over = divmod(int(video_BK.sum()), sum(sizes))
    clips: list[Clip] = []
    for copy in range(copies):
        row_V, at_V = video_BK[copy::copies].nonzero(as_tuple=True)
        parts = zip(row_V.split(sizes), at_V.split(sizes), seen.grid_N3[:, 0].tolist(), strict=True) if len(at_V) == sum(sizes) else ()
        for number, (row_P, at_P, frames) in enumerate(parts):
            if len(row_P.unique()) == 1:
                clips.append(Clip(int(row_P[0]) * copies + copy, at_P.view(frames, -1), number))
    if over or len(clips) != copies * len(sizes) or not clips:
        raise AerogelError(
            f"the videos that the vision tower read have {sum(sizes):,} tokens, {max(sizes):,} at most in one, and they do not fit the "
            f"{int(video_BK.sum()):,} video tokens of {len(video_BK)} prompts; read each prompt in one forward"
        )
    return clips


def _in_frames(row: int, at_V: Tensor, frames: int, number: int) -> Clip:
    """The clip that a row's image tokens are."""
    places, over = divmod(len(at_V), frames)
    if not places or over > 1:
        raise AerogelError(f"a prompt has {len(at_V):,} image tokens, which are not {frames} frames of equal size; set the option frames")
    at_FP = at_V[: frames * places].view(frames, places)
    if bool((at_FP.diff(dim=1) > 1).any()):
        raise AerogelError(
            f"{frames} frames of {places:,} image tokens each would go across text or separators, so they are none; set the option frames"
        )
    return Clip(row, at_FP, number)


def _copies(stage: Stage, frames: int) -> int:
    """How often each row is there, for beams: what `generate` of transformers made of the vision tower's outputs says so.

    There it has an entry for each image, which the tower read as one, and one for each video, which it read as so many frames.
    """
    outputs = stage.inputs.get("mm_encoder_outputs") or {}
    modality, read = ("video", frames) if outputs.get("video") is not None else ("image", 1)
    features = getattr(outputs.get(modality), "pooler_output", None)
    if features is None or stage.tower is None or not stage.tower.images:
        return 1
    return max(1, len(features) * read // stage.tower.images)


class ClipAttention(NamedTuple):
    """Findings of the vision tower about a clip."""

    received_FP: Tensor
    """Attention that the places of its frames receive."""
    head_FP: Tensor | None
    """Attention of the pooling head, where there is one."""
    vector_FC: Tensor | None
    """Output of the pooling head for each frame, where there is one."""


def attention_of(stage: Stage, clips: Sequence[Clip]) -> list[ClipAttention]:
    """Return the attention in the vision tower to each clip of a forward; raises AerogelError where the tower did not run."""
    if stage.tower is None:
        raise AerogelError(
            "the vision tower did not run before this prompt, and its attention is asked for; give images, not their features"
        )
    shape_of = {clip.number: clip.at_FP.shape for clip in clips}
    shapes = [shape_of[number] for number in sorted(shape_of)]
    sizes, frames = [shape.numel() for shape in shapes], [shape[0] for shape in shapes]
    received = stage.tower.received_by_tokens(sum(sizes)).split(sizes)
    head_V, vector_IC = stage.tower.head_of_tokens(sum(sizes)), stage.tower.vector_IC
    heads = [None] * len(shapes) if head_V is None else [part.view(shape) for part, shape in zip(head_V.split(sizes), shapes, strict=True)]
    whole = vector_IC is not None and len(vector_IC) == sum(frames)  # else an image holds several frames
    vectors = vector_IC.split(frames) if vector_IC is not None and whole else [None] * len(shapes)
    found = [
        ClipAttention(part.view(shape), head_FP, vector_FC)
        for part, shape, head_FP, vector_FC in zip(received, shapes, heads, vectors, strict=True)
    ]
    place_of = {number: place for place, number in enumerate(sorted(shape_of))}
    return [found[place_of[clip.number]] for clip in clips]
