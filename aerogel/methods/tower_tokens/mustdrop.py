"""MustDrop, its stage in the vision tower: windows of patches that are alike become one token (arXiv:2411.10803)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from aerogel.methods.base import Before, Requirement
from aerogel.methods.tokens.policy import Budget
from aerogel.methods.tower_tokens.policy import TowerPolicy, count_of
from aerogel.model.network import Network
from aerogel.numerics.token_merging import likeness, windows
from aerogel.options import Share
from aerogel.runtime.tokens.images import Chosen, Image, patch_grid


@dataclass(frozen=True)
class Mustdrop(TowerPolicy):
    """Merges square windows of the features whose mean cosine is highest; a window's mean has the place of its last patch.

    The stages that published code has in the decoder, by the text, are not part of it.
    """

    requires: ClassVar[frozenset[Requirement]] = TowerPolicy.requires | {"patch_grid"}

    keep: Budget | None = None
    """Tokens of an image that stay, a number or a share: as many windows are merged as that takes, rounded down; instead of a threshold."""
    threshold: Share = 0.6
    """Mean cosine from which on a window is merged."""
    window: Annotated[int, Field(ge=2, le=16)] = 3
    """Patches of a window's side."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare windows and the grid of patches."""
        yield from super().problems(network, before)
        if (grid := patch_grid(network)) % self.window:
            yield f"windows of {self.window} x {self.window} patches do not divide its {grid} x {grid} patches; give another window"

    def choose(self, image: Image) -> Chosen | None:
        """Merge windows."""
        place_GW = windows(round(len(image.row_PC) ** 0.5), self.window).to(image.row_PC.device)
        alike_G = likeness(image.row_PC, place_GW)
        count = int((alike_G >= self.threshold).sum())
        if self.keep is not None:
            # Published code counts the class token among those that stay and among those that there are.
            count = (len(image.score_P) - count_of(self.keep, image.score_P) + 1) // (self.window**2 - 1)
        if not (count := min(count, len(place_GW))):
            return None
        place_MW = place_GW[alike_G.argsort(descending=True, stable=True)[:count]]
        keep_P = torch.ones(len(image.row_PC), dtype=torch.bool, device=place_GW.device)
        keep_P[place_MW[:, :-1]] = False
        row_PC = image.row_PC.clone()
        row_PC[place_MW[:, -1]] = image.row_PC[place_MW].mean(1)
        return Chosen(keep_P, row_PC)
