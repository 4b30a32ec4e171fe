"""Positions that stay when tokens are dropped, and what is cut to them: hidden states, rotary angles, masks.

B rows, N positions, K of them kept, Q queries, S keys, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The positions of each row that stay, in their order."""

    at_BK: Tensor
    """Positions, ascending; a row that keeps fewer than another repeats its last one."""
    real_BK: Tensor | None = None
    """False where a row repeats its last position to be as long as the others; None where all rows keep as many."""
    angle_BK: Tensor | None = None
    """Positions whose rotary angles they get; None for their own."""

    @classmethod
    def of(cls, keep_BN: Tensor) -> Kept:
        """Return the positions where a mask is True; every row keeps at least one."""
        count_B = keep_BN.sum(1)
        most = int(count_B.max())
        at_BK = (~keep_BN).byte().argsort(dim=1, stable=True)[:, :most]
        if bool((count_B == most).all()):
            return cls(at_BK)
        real_BK = torch.arange(most, device=at_BK.device) < count_B[:, None]
        return cls(torch.where(real_BK, at_BK, at_BK.gather(1, count_B[:, None] - 1)), real_BK)

    @classmethod
    def all(cls, rows: int, positions: int, device: torch.device) -> Kept:
        """Return all positions."""
        return cls(torch.arange(positions, device=device).expand(rows, -1))

    def missing(self, positions: int) -> int:
        """Return how many of so many positions a row do not stay, over all rows."""
        real = self.at_BK.numel() if self.real_BK is None else int(self.real_BK.sum())
        return len(self.at_BK) * positions - real

    def then(self, later: Kept) -> Kept:
        """Return what stays where `later` keeps some of the positions kept here."""
        real_BK = self.real_BK if self.real_BK is None else self.real_BK.gather(1, later.at_BK)
        if later.real_BK is not None:
            real_BK = later.real_BK if real_BK is None else later.real_BK & real_BK
        angle_BK = self.angle_BK if self.angle_BK is None else self.angle_BK.gather(1, later.at_BK)
        return Kept(self.at_BK.gather(1, later.at_BK), real_BK, angle_BK)

    def renumbered(self) -> Kept:
        """Return the same positions with the angles of consecutive ones, of which the last has its own."""
        real_BK = torch.ones_like(self.at_BK, dtype=torch.bool) if self.real_BK is None else self.real_BK
        after_BK = real_BK.flip(1).cumsum(1).flip(1) - real_BK.long()
        return Kept(self.at_BK, self.real_BK, (self.at_BK[:, -1:] - after_BK).clamp(min=0))

    def rows(self, x_BN: Tensor) -> Tensor:
        """Cut a tensor (B or 1, N, ...) to the kept positions of each row."""
        if len(self.at_BK) == 1:
            return x_BN.index_select(1, self.at_BK[0])
        row_B1 = torch.arange(len(self.at_BK), device=self.at_BK.device)[:, None]
        return x_BN.expand(len(self.at_BK), *x_BN.shape[1:])[row_B1, self.at_BK]

    def last_axis(self, x_N: Tensor) -> Tensor:
        """Cut the last axis of position ids: (N), (B or 1, N) or (axes of a rotary embedding, B, N)."""
        if x_N.ndim == 1:
            return self.rows(x_N[None])
        return self.rows(x_N.movedim((-2, -1), (0, 1))).movedim((0, 1), (-2, -1))

    def spread(self, x_BKC: Tensor, positions: int) -> Tensor:
        """Put kept rows back to their places; the others are NaN, as there is nothing that they could say."""
        rows, _, channels = x_BKC.shape
        at_BK = self.at_BK if self.real_BK is None else self.at_BK.masked_fill(~self.real_BK, positions)
        whole = x_BKC.new_full((rows, positions + 1, channels), torch.nan)
        return whole.scatter_(1, at_BK[..., None].expand(-1, -1, channels), x_BKC)[:, :positions]


def cut_mask(mask: Tensor | None, query: Kept, key_BS: Tensor, real_BS: Tensor | None, before: int) -> Tensor | None:
    """Return the attention mask of kept queries and keys.

    `mask` is that of the whole forward (B or 1, H or 1, N, L), boolean or to be added, with L positions seen so far, or None where every
    query sees what comes up to it; `key_BS` are the positions of the keys among the L, or (B, H, S) where heads differ; `before` is how
    many were seen before this forward.
    None is returned where it says as much.
    """
    queries, keys = query.at_BK.shape[1], key_BS.shape[-1]
    key_BHS = key_BS if key_BS.ndim == 3 else key_BS[:, None]
    real_BHS = real_BS if real_BS is None or real_BS.ndim == 3 else real_BS[:, None]
    if mask is None:
        if real_BHS is None and (queries == 1 or keys == queries):
            return None
        allowed_BHQS = key_BHS[:, :, None, :] <= query.at_BK[:, None, :, None] + before
        return allowed_BHQS if real_BHS is None else allowed_BHQS & real_BHS[:, :, None, :]
    rows, heads = len(key_BHS), max(mask.shape[1], key_BHS.shape[1])
    mask = mask.expand(rows, heads, -1, -1)
    mask = mask.gather(2, query.at_BK[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    mask = mask.gather(3, key_BHS[:, :, None, :].expand(-1, heads, queries, -1))
    if real_BHS is None:
        return mask
    return mask.masked_fill(~real_BHS[:, :, None, :], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def cut_arguments(arguments: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Cut what a decoder block of transformers is given for each position beside hidden states and mask."""
    cut = dict(arguments)
    kept = kept if kept.angle_BK is None else Kept(kept.angle_BK)
    embeddings = cut.get("position_embeddings")
    if isinstance(embeddings, tuple):
        cut["position_embeddings"] = tuple(kept.rows(part) for part in embeddings)
    elif isinstance(embeddings, Tensor):
        cut["position_embeddings"] = kept.rows(embeddings)
    for name in ("position_ids", "cache_position"):
        if isinstance(cut.get(name), Tensor):
            whole = cut[name]
            cut[name] = kept.rows(whole[None])[0] if name == "cache_position" else kept.last_axis(whole)
    return cut
