"""Errors of temporal features: what a block of a denoiser is told about the step, beside what the original tells it.

T steps, C width of a feature. The three measures are those of arXiv:2311.16503: error, cosine, and a feature that means another step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Drift(NamedTuple):
    """One block's features against the exact ones, step by step, in float64."""

    error_T: Tensor
    """Squared size of what came in between, ||F^ - F||^2."""
    size_T: Tensor
    """Squared size of the exact feature, ||F||^2."""
    cosine_T: Tensor
    """Of the angle between the two; 1 where both are zero, 0 where one is."""
    mismatch_T: Tensor
    """True if the exact feature of another step is nearer than that of this one."""

    @property
    def relative(self) -> Tensor:
        """The error over the size (T); 0 where both are zero, infinite where only the size is."""
        return torch.where(self.error_T == 0, torch.zeros_like(self.error_T), self.error_T / self.size_T)


@torch.no_grad()
def drift(exact_TC: Tensor, given_TC: Tensor) -> Drift:
    """Compare the features that a block is given at each step with the exact ones."""
    exact_TC, given_TC = exact_TC.double(), given_TC.double()
    error_T, size_T, given_T = (vector_TC.square().sum(-1) for vector_TC in (given_TC - exact_TC, exact_TC, given_TC))
    inner_T, lengths_T = (exact_TC * given_TC).sum(-1), (size_T * given_T).sqrt()
    silent_T = (size_T == 0) & (given_T == 0)
    cosine_T = torch.where(lengths_T == 0, silent_T.double(), inner_T / lengths_T).clamp(-1, 1)
    # Row by row: all distances at once would take T x T x C numbers, and a product of matrices would lose the small ones.
    nearest_T = torch.stack([(exact_TC - given_1C).square().sum(-1).min() for given_1C in given_TC])
    return Drift(error_T, size_T, cosine_T, nearest_T < error_T)


class Totals(NamedTuple):
    """Over all blocks and steps."""

    error: float
    """Sum of the errors over the sum of the sizes."""
    cosine: float
    """Mean of the cosines."""
    least_cosine: float
    mismatch: float
    """Share of blocks and steps."""


def totals(drifts: Sequence[Drift]) -> Totals:
    """Sum up the drifts of several blocks; every block and step counts once."""
    error, size = (float(torch.cat(values).sum()) for values in ([one.error_T for one in drifts], [one.size_T for one in drifts]))
    cosines, mismatches = torch.cat([one.cosine_T for one in drifts]), torch.cat([one.mismatch_T for one in drifts])
    relative = error / size if size else math.inf if error else 0.0
    return Totals(relative, float(cosines.mean()), float(cosines.min()), float(mismatches.double().mean()))
