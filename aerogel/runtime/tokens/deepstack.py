"""Features of deeper layers of a vision tower that are added behind the first decoder blocks (DeepStack, arXiv:2406.04334).

B rows, N positions of a forward, K of them that are left, V of an image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.runtime.tokens.kept import Kept

_PLACES, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


class DeepStack:
    """Adds the features in place of the language model, which would add them to all positions of an image."""

    def __init__(self) -> None:
        self._place_BN: Tensor | None = None
        self._features: Sequence[Tensor] = ()

    def take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the language model: take the features away from it."""
        self._place_BN, features_VC = kwargs.get(_PLACES), kwargs.get(_FEATURES)
        self._features = () if features_VC is None else features_VC
        if self._place_BN is None or features_VC is None:
            return None
        return args, kwargs | {_PLACES: None, _FEATURES: None}

    def add(self, block: int, hidden_BKC: Tensor, kept: Kept | None) -> Tensor:
        """Return a block's output with the features of its number, if there are any."""
        if self._place_BN is None or block >= len(self._features):
            return hidden_BKC
        whole_BNC = self._whole(self._place_BN, self._features[block], hidden_BKC)
        return hidden_BKC + (whole_BNC if kept is None else kept.rows(whole_BNC))

    def side_by_side(self, hidden_BKC: Tensor, kept: Kept) -> Tensor | None:
        """Return all features of the positions that are left, one layer behind the other (B, K, layers x C); None where there are none."""
        if self._place_BN is None or not len(self._features):
            return None
        whole = [self._whole(self._place_BN, features_VC, hidden_BKC) for features_VC in self._features]
        return kept.rows(torch.cat(whole, -1))

    @staticmethod
    def _whole(place_BN: Tensor, features_VC: Tensor, like: Tensor) -> Tensor:
        """Features at their places among all positions of the forward, zero elsewhere."""
        place_BN = place_BN.to(like.device)
        whole_BNC = like.new_zeros(*place_BN.shape, features_VC.shape[-1])
        whole_BNC[place_BN] = features_VC.to(like)
        return whole_BNC
