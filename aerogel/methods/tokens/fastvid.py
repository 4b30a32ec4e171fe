"""FastVID: the tokens of a frame with most attention stay, and a few in each segment of a clip take up the others (arXiv:2503.11187)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aerogel.methods.tokens.policy import ClipPolicy
from aerogel.numerics.video_tokens import Fastvid as Settings
from aerogel.numerics.video_tokens import Reduced, fastvid
from aerogel.options import Count, Share
from aerogel.runtime.tokens.clips import ClipAttention


@dataclass(frozen=True)
class Fastvid(ClipPolicy):
    """Keeps tokens of clips by the attention of the vision tower's pooling head, and merges the others at density peaks.

    Published for towers with a pooling head (SigLIP). Without one, attention is that of the class token, or what a token receives, in the
    tower's last block that sees whole images, and a frame is compared by the mean of its tokens; a tower whose attention cannot be read is
    refused.
    """

    keep: Share = 0.1
    """Share of a frame's tokens that stays, on average over a segment; rounded down."""
    contextual: Share = 0.4
    """Share of these that are anchors of merged tokens; the others are those with most attention."""
    segments: Count = 8
    """Segments of a clip at least, where it has so many frames."""
    threshold: Share = 0.9
    """Cosine of neighbouring frames below which a segment ends."""
    every: Count = 4
    """Frames from one with anchors to the next, counted from the end of a segment."""
    anchor: Share = 0.6
    """Least weight of an anchor against the mean of what it takes up."""
    neighbours: Count = 4
    """Neighbours by which density is measured."""

    @property
    def reads_attention(self) -> bool:
        """True: attention says which tokens stay."""
        return True

    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Choose and merge."""
        assert attention is not None
        settings = Settings(self.keep, self.contextual, self.segments, self.threshold, self.every, self.anchor, self.neighbours)
        vector_FC = x_FPC.float().mean(1) if attention.vector_FC is None else attention.vector_FC
        return fastvid(x_FPC, vector_FC, attention.received_FP if attention.head_FP is None else attention.head_FP, settings)
