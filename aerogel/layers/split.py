"""A layer that reads concatenated channels as the sum of parts, one for each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.layers.replacement import Assigned, Replacement


class Split(Replacement):
    """A linear or a convolution as the sum of parts that read a run of its input channels each; the first has the bias.

    Shapes: input (..., I) or (N, I, H, W), output as the layer's; `widths` sum to I.
    """

    effect: ClassVar[str] = "is split into layers that read some of its input channels each"

    def __init__(self, layer: Layer, widths: Sequence[int]) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise AerogelError(f"a convolution in {layer.groups} groups is not split; ignore it by name")
        self.widths = tuple(widths)
        # Numbers as names: `conv_shortcut.0` is the part that reads the first source.
        for number, weight in enumerate(layer.weight.detach().split(self.widths, dim=1)):
            self.add_module(str(number), _part(layer, weight, bias=number == 0))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - code of models may give it by the name that nn.Linear has
        """Return the sum of the parts."""
        first, *rest = self.children()
        pieces = input.split(self.widths, dim=1 if input.ndim == 4 else -1)
        total: Tensor = first(pieces[0])
        for part, piece in zip(rest, pieces[1:], strict=True):
            total = total + part(piece)
        return total

    def describe(self) -> dict[str, Any]:
        """Return how many input channels each part reads."""
        return {"widths": list(self.widths)}

    @classmethod
    def rebuild(cls, layer: nn.Module, told: Mapping[str, Any], assigned: Assigned | None) -> Split:
        """Return the split form of a layer, with its weights."""
        widths = told["widths"]
        if not isinstance(layer, Layer) or sum(widths) != layer.weight.shape[1]:
            raise AerogelError(f"a {type(layer).__name__} is no layer with {sum(widths)} input channels and cannot be split at {widths}")
        return cls(layer, widths)


def _part(layer: Layer, weight: Tensor, bias: bool) -> Layer:
    made: Layer
    if isinstance(layer, nn.Linear):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias and layer.bias is not None, device="meta")
    else:
        made = nn.Conv2d(
            weight.shape[1], weight.shape[0], layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
            bias=bias and layer.bias is not None, padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
    made.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=layer.weight.requires_grad)
    if made.bias is not None:
        made.bias = layer.bias
    return made.train(layer.training)
