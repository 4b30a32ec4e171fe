"""Masks of the weights to keep by their scores, and the share that is zero. O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_share(weight: Tensor) -> float:
    """Return the share of a weight that is exactly zero."""
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def kept_by_pattern(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Return where the `kept` largest scores are among each `of` inputs in a row; of equal scores the first ones are kept.

    I must be a multiple of `of`.
    """
    runs = score_OI.unflatten(-1, (-1, of))
    order = runs.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.flatten(-2)
