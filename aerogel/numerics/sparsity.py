"""Masks of the weights to keep by their scores, and the share that is zero. O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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


def block_sums(score_OI: Tensor, outputs: int, inputs: int) -> Tensor:
    """Return the sums of the scores of all blocks, (O / outputs, I / inputs); O and I must be multiples of these."""
    return score_OI.float().unflatten(0, (-1, outputs)).unflatten(-1, (-1, inputs)).sum((1, 3))


def zero_blocks(weight_OI: Tensor, outputs: int, inputs: int) -> Tensor:
    """Return which blocks of a weight are all zero, (O / outputs, I / inputs); O and I must be multiples of these."""
    return ~(weight_OI != 0).unflatten(0, (-1, outputs)).unflatten(-1, (-1, inputs)).any(-1).any(1)


_BLOCKS = (128, 64, 32, 16, 8)
"""Sides of the square blocks that are recognised."""


def block_of(weight_OI: Tensor) -> int | None:
    """Return the side of the largest square blocks in which the zeros of a weight come, all but one in a hundred; None where in none.

    Zeros in blocks that are kept are few: those of small numbers.
    """
    zeros = int((weight_OI == 0).sum())
    fitting = (side for side in _BLOCKS if zeros and all(length % side == 0 for length in weight_OI.shape))
    return next((side for side in fitting if int(zero_blocks(weight_OI, side, side).sum()) * side**2 >= 0.99 * zeros), None)


def kept_by_count(score_OI: Tensor, count: int) -> Tensor:
    """Return where a matrix is kept when its `count` smallest scores go; of equal scores the first ones go."""
    return next(kept_of_all([score_OI], count))


def kept_by_row(score_OI: Tensor, count: int | Tensor) -> Tensor:
    """Return where each row is kept when its `count` smallest scores go, or its own of count_O; of equal scores the first ones go."""
    order_OI = score_OI.argsort(dim=-1, stable=True)
    place_I = torch.arange(score_OI.shape[-1], device=score_OI.device)
    stays_OI = place_I >= (count[:, None] if isinstance(count, Tensor) else count)
    return torch.empty_like(score_OI, dtype=torch.bool).scatter_(-1, order_OI, stays_OI.expand_as(order_OI))


def kept_of_all(scores: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Yield where each matrix is kept when the `count` smallest scores of all together go; of equal scores the first ones go."""
    threshold, ties = smallest(scores, count)
    for score_OI in scores:
        size_OI = score_OI.float().abs()
        equal_OI = size_OI == threshold
        first_OI = equal_OI & (equal_OI.flatten().cumsum(0).view_as(equal_OI) <= ties)
        ties -= int(first_OI.sum())
        yield (size_OI >= threshold) & ~first_OI


def smallest(weights: Iterable[Tensor], count: int) -> tuple[float, int]:
    """Return the magnitude of the `count`-th smallest of all weights, and how many of exactly this magnitude are among these.

    Two passes count the upper and then the lower 16 bits of float32, which have the order of the numbers: no list of all weights of a
    model is sorted. `weights` are gone through twice.
    """
    below, found = 0, 0
    for upper in (True, False):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for weight in weights:
            bits = weight.float().abs().flatten().view(torch.int32)
            digits = bits >> 16 if upper else bits[bits >> 16 == found] & 0xFFFF
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        up_to = below + counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, count))
        below = int(up_to[digit] - counts[digit])
        found = (found << 16) + digit
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32)), count - below


_RUNS = (2, 4, 8, 16, 32, 64)
"""Lengths of the runs of patterns that are recognised."""


def run_of(kept_OI: Tensor) -> int:
    """Return the length of the shortest runs of inputs that all keep the same number: M of an N:M mask, a row, or the whole matrix."""
    columns = kept_OI.shape[-1]
    for length in (*(length for length in _RUNS if columns % length == 0), columns):
        counts = kept_OI.reshape(-1, length).sum(-1)
        if bool((counts == counts[0]).all()):
            return length
    return kept_OI.numel()


def kept_like(score_OI: Tensor, kept_OI: Tensor) -> Tensor:
    """Return where the largest scores are, as many as in another mask and in its pattern; of equal scores the first ones are kept."""
    if (side := block_of(kept_OI)) is not None:
        blocks_RC = kept_by_count(block_sums(score_OI, side, side), int(zero_blocks(kept_OI, side, side).sum()))
        return blocks_RC.repeat_interleave(side, 0).repeat_interleave(side, 1)
    length = run_of(kept_OI)
    runs = score_OI.reshape(-1, length)
    count = int(kept_OI.reshape(-1, length)[0].sum())
    order = runs.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[:, :count], True).view_as(score_OI)
