"""DyCoke: of four frames the first stays whole, and of the others what is least like an earlier one (arXiv:2411.15024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aerogel.methods.tokens.policy import ClipPolicy
from aerogel.numerics.video_tokens import Reduced, dycoke
from aerogel.options import Share
from aerogel.runtime.tokens.clips import ClipAttention


@dataclass(frozen=True)
class Dycoke(ClipPolicy):
    """Compares tokens of clips with those of the same place one or two frames before, and drops the most alike of three frames in four.

    Its name speaks of merging; tokens are dropped. The reduction of the cache while text is generated is not part of it.
    """

    keep: Share = 0.3
    """Share of a frame's tokens that stays in frames that are compared; 0.3 makes 47.5 % of all."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return the share of compared frames that makes this share of all; a quarter stays at least."""
        return {"keep": max(0.0, round((4 * share - 1) / 3, 4))}

    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Compare frames."""
        return dycoke(x_FPC, self.keep)
