"""Base of policies that drop and merge tokens of clips before the first block of the decoder.

B rows, N positions of a forward, K of them that are left, F frames, P places of a frame, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.base import Before
from aerogel.methods.tokens.policy import TokenPolicy, TokenState, first_with_images
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.video_tokens import Reduced
from aerogel.options import CountOrZero
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.tokens.clips import GRID, Clip, ClipAttention, attention_of, clips_of
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import image_path_of
from aerogel.runtime.tokens.stage import Rule, Selection, Stage
from aerogel.runtime.tokens.vision_tower import VisionTower

CLIPS = "clips"
"""Name by which later rules of a forward find where its clips are (B, N)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipState(TokenState):
    """The attention of the vision tower that is read, beside what every such policy has."""

    attention: str = ""
    """Full name of the attention; empty where none is read."""
    class_token: bool = False
    """True where the first position of the tower stands for the whole image."""


@dataclass(frozen=True)
class ClipPolicy(TokenPolicy):
    """Drops and merges tokens of clips before the first block; images in the same prompt stay whole."""

    state: ClassVar[type[PolicyState]] = ClipState

    frames: CountOrZero = field(default=0, kw_only=True)
    """Frames of equal size that the image tokens of each prompt are, for models whose inputs hold no grid of a video; 0: there is one."""

    @property
    def reads_attention(self) -> bool:
        """True where the rule reads attention in the vision tower."""
        return False

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for the vision tower, which is given the grids of videos."""
        try:
            VisionTower.of(network, decoder_of(network))
        except AerogelError as error:
            yield str(error)
        yield from super().problems(network, before)

    def fitted(self, network: Network, calls: Sequence[Call]) -> ClipState:
        """Find the attention that is read; raises AerogelError where there is none that can be."""
        blocks = decoder_of(network).depth
        if not self.reads_attention:
            return ClipState(blocks=blocks)
        path = image_path_of(network, first_with_images(network, calls))
        return ClipState(blocks=blocks, attention=path.attention, class_token=path.class_token)

    def watched_tower(self, network: Network, state: TokenState) -> VisionTower | None:
        """Return the tower."""
        assert isinstance(state, ClipState)
        return VisionTower.of(network, decoder_of(network), state.attention, state.class_token)

    @abstractmethod
    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """Return what stays of a clip, given its embeddings and, where the policy reads it, the attention in the vision tower."""

    def reduced(self, stage: Stage, clip: Clip, attention: ClipAttention | None) -> Reduced:
        """Return what stays of a clip of a forward: by its embeddings, unless a policy says otherwise."""
        return self.reduce(stage.hidden_BKC[clip.row, clip.at_FP], attention)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {0: self.reduce_clips}

    def reduce_clips(self, stage: Stage) -> Selection | None:
        """Reduce clip by clip, and remember where clips are."""
        keep_BK, hidden_BKC = torch.ones_like(stage.vision_BK), stage.hidden_BKC.clone()
        clip_BK = torch.zeros_like(keep_BK)
        clips = clips_of(stage, self.frames)
        attention = attention_of(stage, clips) if clips and self.reads_attention else [None] * len(clips)
        for clip, seen in zip(clips, attention, strict=True):
            clip_BK[clip.row, clip.at_FP] = True
            reduced = self.reduced(stage, clip, seen)
            keep_BK[clip.row, clip.at_FP] = reduced.keep_FP
            hidden_BKC[clip.row, clip.at_FP] = reduced.x_FPC
        stage.memory[CLIPS] = clip_BK
        return None if bool(keep_BK.all()) else Selection(keep_BK, hidden_BKC)

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for clips."""
        if not self.frames and not any(call.kwargs.get(GRID) is not None for call in calls):
            yield (
                f"the calibration data has no clip with a grid ({GRID}); give chats with videos by --data, or say by the option frames how "
                "many frames the image tokens of a prompt are"
            )
        yield from super().unsuitable(network, calls)
