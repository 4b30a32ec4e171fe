"""PruneVid, first stage: what stays the same in a segment of a clip becomes a mean, then what is alike in a frame (arXiv:2412.16117)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aerogel.methods.tokens.policy import ClipPolicy
from aerogel.numerics.video_tokens import Reduced, prunevid
from aerogel.options import Count, CountOrZero, Share
from aerogel.runtime.tokens.clips import ClipAttention


@dataclass(frozen=True)
class Prunevid(ClipPolicy):
    """Merges static places of clips over the frames of a segment, and tokens of a frame by clusters; nothing depends on the question.

    The stage that a question guides inside the language model is not part of it. How many tokens stay depends on the clip.
    """

    segments: Share = 0.25
    """Segments, as a share of the frames: clusters of frames, made contiguous."""
    threshold: Share = 0.8
    """Mean cosine of any two frames of a segment above which a place is static; 1: none is."""
    merged: Share = 0.5
    """Clusters, as a share of the static tokens of a segment and of the other tokens of each frame; 1: they are left as they are."""
    least: CountOrZero = 14
    """Tokens up to which a set is left as it is."""
    neighbours: Count = 7
    """Neighbours by which density is measured."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return the share of clusters; static places leave fewer tokens."""
        return {"merged": share}

    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Merge."""
        return prunevid(x_FPC, self.segments, self.threshold, self.merged, self.least, self.neighbours)
