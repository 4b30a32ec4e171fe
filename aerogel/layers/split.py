"""A layer that reads concatenated channels as the sum of parts, one for each source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer


class Split(nn.Module):
    """A linear or a convolution as the sum of parts that read a run of its input channels each; the first has the bias.

    Shapes: input (..., I) or (N, I, H, W), output as the layer's; `widths` sum to I.
    """

    def __init__(self, layer: Layer, widths: Sequence[int]) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise AerogelError(f"a convolution in {layer.groups} groups is not split; ignore it by name")
        self.widths = tuple(widths)
        # Numbers as names: `conv_shortcut.0` is the part that reads the first source.
        for number, weight in enumerate(layer.weight.detach().split(self.widths, dim=1)):
            self.add_module(str(number), _part(layer, weight, bias=number == 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the parts."""
        first, *rest = self.children()
        pieces = x.split(self.widths, dim=1 if x.ndim == 4 else -1)
        total: Tensor = first(pieces[0])
        for part, piece in zip(rest, pieces[1:], strict=True):
            total = total + part(piece)
        return total


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


def splits(module: nn.Module) -> dict[str, list[int]]:
    """The split layers of a module by name, with their widths."""
    return {name: list(part.widths) for name, part in module.named_modules() if isinstance(part, Split)}


def split(module: nn.Module, name: str, widths: Sequence[int]) -> None:
    """Put the split form of a layer in its place; one that is split already stays."""
    layer = module.get_submodule(name)
    if isinstance(layer, Split):
        return
    if not isinstance(layer, Layer) or sum(widths) != layer.weight.shape[1]:
        raise AerogelError(f"{name} is no layer with {sum(widths)} input channels; it cannot be split at {list(widths)}")
    module.set_submodule(name, Split(layer, widths))
