"""Widths of layers that no configuration holds: convolutions, norms and linear layers that are narrower than the model's class makes them.

A model remembers them by the names of its layers; a quantization_config has them in the entry `narrowed`, and they are put in place before
quantized layers are, which have the widths of the layers they replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError

Widths = Mapping[str, Mapping[str, int]]
"""The attributes of layers that say their widths, by full name of the layer."""
KEY = "narrowed"
"""The entry of a quantization_config."""
_ATTRIBUTE = "narrowed_layers"
_DIMENSIONS: dict[type[nn.Module], dict[str, int | None]] = {
    nn.Conv2d: {"out_channels": 0, "in_channels": 1},
    nn.Linear: {"out_features": 0},
    nn.GroupNorm: {"num_channels": 0, "num_groups": None},
    nn.BatchNorm2d: {"num_features": 0},
}
"""Kinds of layers that can be narrower, with the dimension of their tensors that each width is the size of; None for a count of groups."""


def remember(module: nn.Module, widths: Widths) -> None:
    """Keep the widths of layers with the model that has them, beside those it has already."""
    vars(module)[_ATTRIBUTE] = {**widths_of(module), **{name: {**widths_of(module).get(name, {}), **own} for name, own in widths.items()}}


def widths_of(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return the widths of a model's layers that its configuration does not hold; empty where there are none."""
    found: dict[str, dict[str, int]] = vars(module).get(_ATTRIBUTE, {})
    return found


def narrow_as_told(module: nn.Module, widths: Widths) -> None:
    """Make layers of a model as narrow as a quantization_config says, with nothing in them; raises AerogelError where they cannot be."""
    if not widths:
        return
    parts = dict(module.named_modules())
    for name, own in widths.items():
        layer = parts.get(name)
        if layer is None:
            raise AerogelError(f"quantization_config: {KEY}: the model has no layer {name}; get config.json and weights of one model")
        _narrow(name, layer, own)
    remember(module, widths)


def narrowed_shapes(layer: nn.Module, own: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the parameters and buffers of a layer have with these widths, by name in the layer, where they are others."""
    found: dict[str, tuple[int, ...]] = {}
    dimensions = next(found for cls, found in _DIMENSIONS.items() if isinstance(layer, cls))
    for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        sizes = {dimension: own[width] for width, dimension in dimensions.items() if width in own and dimension is not None}
        shape = tuple(sizes.get(at, size) for at, size in enumerate(tensor.shape))
        if shape != tuple(tensor.shape):
            found[key] = shape
    return found


def _narrow(name: str, layer: nn.Module, own: Mapping[str, int]) -> None:
    dimensions = next((found for cls, found in _DIMENSIONS.items() if isinstance(layer, cls)), None)
    if dimensions is None or getattr(layer, "groups", 1) != 1:
        raise AerogelError(
            f"quantization_config: {KEY}: {name} is a {type(layer).__name__}, which cannot be narrower; fetch config.json again"
        )
    for key, width in own.items():
        now = getattr(layer, key, None) if key in dimensions else None
        if now is None:
            raise AerogelError(f"quantization_config: {KEY}: {name} has {key!r}, expected {', '.join(dimensions)}; fetch config.json again")
        if not 1 <= width <= now:
            raise AerogelError(f"quantization_config: {KEY}: {name}.{key} is {width}, expected 1 to {now}; fetch config.json again")
        setattr(layer, key, width)
        if (dimension := dimensions[key]) is not None:
            _resize(layer, dimension, width)
    if isinstance(layer, nn.GroupNorm) and layer.num_channels % layer.num_groups:
        raise AerogelError(
            f"quantization_config: {KEY}: {name} has {layer.num_channels} channels in {layer.num_groups} groups, expected groups of one "
            "size; fetch config.json again"
        )


def _resize(layer: nn.Module, dimension: int, width: int) -> None:
    for key, parameter in layer.named_parameters(recurse=False):
        if parameter.ndim > dimension:
            setattr(layer, key, nn.Parameter(_empty(parameter, dimension, width), requires_grad=parameter.requires_grad))
    for key, buffer in layer.named_buffers(recurse=False):
        if buffer.ndim > dimension:
            layer._buffers[key] = _empty(buffer, dimension, width)


def _empty(tensor: Any, dimension: int, width: int) -> Tensor:
    return torch.empty((*tensor.shape[:dimension], width, *tensor.shape[dimension + 1 :]), dtype=tensor.dtype, device=tensor.device)
