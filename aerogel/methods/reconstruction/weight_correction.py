"""Weight correction: the rows of a pruned weight get back the spread and the mean that they had before.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.layers.conv import Layer, matrix
from aerogel.methods.reconstruction.policy import ReconstructionMethod, original_of
from aerogel.model.block import Block


@dataclass(frozen=True)
class WeightCorrection(ReconstructionMethod):
    """Scales and shifts the weights that each output has left, towards the standard deviation and the mean of all it had (closed form)."""

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Correct every pruned layer."""
        for name, layer in self.pruned(block).items():
            before: Layer = original_of(block).module.get_submodule(name)  # type: ignore[assignment]
            kept_OI = block.kept_mask(name)
            assert kept_OI is not None, "it was pruned"
            weight_OI = matrix(layer)
            gain_O, shift_O = gain_and_shift(matrix(before).float(), weight_OI.float(), kept_OI)
            weight_OI.copy_((weight_OI.float() * gain_O[:, None] + shift_O[:, None]) * kept_OI)
            block.prune(name, kept_OI)
            block.note(name, gain=float(gain_O.mean()))


def gain_and_shift(dense_OI: Tensor, weight_OI: Tensor, kept_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return gain_O = std(dense) / std(weight * kept) of each row, and shift_O = mean(dense) - gain * mean(weight * kept).

    A row of zeros, and one whose kept weights do not differ, has gain 1.
    """
    pruned_OI = weight_OI * kept_OI
    spread_O = pruned_OI.std(1, correction=0)
    gain_O = torch.where(spread_O > 0, dense_OI.std(1, correction=0) / spread_O.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return gain_O, dense_OI.mean(1) - gain_O * pruned_OI.mean(1)
