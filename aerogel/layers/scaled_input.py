"""Linear layers whose input is divided by one scale a channel, where no other layer can take the scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.layers.linear import QuantLinear
from aerogel.layers.replacement import Assigned, Replacement


class ScaledInput(Replacement):
    """A linear that divides its input by one scale a channel first."""

    effect: ClassVar[str] = "divides its input by a scale for each channel"

    def __init__(self, inner: nn.Linear | QuantLinear, scale_I: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", scale_I)
        self.scale: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - code of models may give it by the name that nn.Linear has
        """Return inner(input / scale)."""
        out: Tensor = self.inner(input / self.scale.to(input.dtype))
        return out

    def describe(self) -> dict[str, Any]:
        """Return nothing: the width of the scale is that of the linear."""
        return {}

    @classmethod
    def rebuild(cls, layer: nn.Module, told: Mapping[str, Any], assigned: Assigned | None) -> ScaledInput:
        """Return one around a linear."""
        assert isinstance(layer, nn.Linear), "only linear layers have scaled inputs"
        return cls(layer, torch.ones(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
