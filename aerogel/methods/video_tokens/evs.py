"""Efficient Video Sampling: tokens of a clip stay that are least like the same place in the frame before (arXiv:2510.14624)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from aerogel.methods.video_tokens.policy import ClipPolicy
from aerogel.numerics.video_tokens import Reduced, evs
from aerogel.runtime.tokens.clips import Clip, ClipAttention
from aerogel.runtime.tokens.stage import Stage


@dataclass(frozen=True)
class Evs(ClipPolicy):
    """Compares tokens of clips with those of the same place in the frame before, and drops the most alike of the whole clip.

    The rule is that of vLLM, which a folder with this policy tells to do the same.
    """

    pruning_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a clip's tokens that is dropped, as vLLM's `--video-pruning-rate`; the first frame stays whole in any case."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return the rate that leaves this share; clips of few frames keep more, since the first stays."""
        return {"pruning_rate": round(1 - share, 4)}

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Return vLLM's rate; frames that are images are no video there."""
        return {} if self.frames else {"video-pruning-rate": self.pruning_rate}

    def reduced(self, stage: Stage, clip: Clip, attention: ClipAttention | None) -> Reduced:
        """Compare the embeddings together with the features of deeper layers of the vision tower, where the model has some."""
        x_FPC = stage.hidden_BKC[clip.row, clip.at_FP]
        deeper_BKD = stage.deeper()
        compared_FPD = x_FPC if deeper_BKD is None else torch.cat((x_FPC, deeper_BKD[clip.row, clip.at_FP]), -1)
        return self.reduce(compared_FPD, attention)._replace(x_FPC=x_FPC)

    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Compare frames."""
        return Reduced(evs(x_FPC, self.pruning_rate), x_FPC)
