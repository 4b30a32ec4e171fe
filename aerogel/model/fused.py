"""Activations of diffusers' transformers that the product before them computes on the way; where there is none they stay what they were."""

from __future__ import annotations

from diffusers.models.activations import GELU
from torch import Tensor, nn

from aerogel.model.modules import QuantLinear


class FusedGELU(GELU):
    """diffusers' GELU behind a linear, which it leaves to the kernel of a quantized one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project and activate."""
        if isinstance(self.proj, QuantLinear):
            return self.proj.followed(hidden_states, "gelu_tanh" if self.approximate == "tanh" else "gelu")
        activated: Tensor = super().forward(hidden_states)
        return activated


def fuse(module: nn.Module) -> None:
    """Let activations behind quantized linears be fused with them; their class is all that changes."""
    for part in module.modules():
        if type(part) is GELU and isinstance(part.proj, QuantLinear):
            part.__class__ = FusedGELU


def part_again(module: nn.Module) -> None:
    """Undo `fuse`."""
    for part in module.modules():
        if type(part) is FusedGELU:
            part.__class__ = GELU
