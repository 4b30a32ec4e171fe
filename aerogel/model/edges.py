"""Folding: move scales along an edge, from the channels of its source into the columns of its sinks.

Legend: C source channels of the edge, I input columns of a sink. C is smaller than I where query heads share a value head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.model.block import Block, BoundEdge


class Channels(NamedTuple):
    """The channels of an edge in its source and in its sinks."""

    first: int
    """Row of the source where they begin."""
    width: int
    """Number of channels: C."""
    repeats: int
    """Number of query heads that read each of them: I / C."""
    head: int
    """Channels that are repeated as one run: those of a head."""

    def spread(self, values_C: Tensor) -> Tensor:
        """One value for each column of a sink: values_I."""
        heads = values_C.view(-1, 1, self.head)
        return heads.expand(-1, self.repeats, -1).reshape(-1)

    def gather(self, values_I: Tensor) -> Tensor:
        """The largest value among the columns that read a channel: values_C."""
        return values_I.view(-1, self.repeats, self.head).amax(dim=1).view(-1)


def channels(block: Block, edge: BoundEdge) -> Channels:
    """Find the channels of an edge; raises AerogelError when the shapes of source and sinks do not fit the edge."""
    source, columns = block.module.get_submodule(edge.source), _columns(block, edge)
    rows = _weight(source, edge.source).shape[0]
    width = rows
    if edge.tail:
        # Fused query, key and value have I + 2 C rows; fused gate and up have 2 C.
        width = (rows - columns) // 2 if edge.heads else columns
    if columns % width or (columns != width and not edge.heads):
        raise AerogelError(
            f"{block.full_name(edge.source)} has {width} channels, its sinks {edge.sinks} read {columns}; correct the family file"
        )
    repeats = columns // width
    head = width if repeats == 1 else _head_width(block.module.get_submodule(edge.source.rpartition(".")[0]))
    return Channels(rows - width, width, repeats, head)


def fold(block: Block, edge: BoundEdge, scale_C: Tensor) -> None:
    """Divide the source's channels by `scale_C` and multiply the columns that read them; the block computes what it did.

    The scales are positive. Norms are divided together with the family's norm offset; biases of the source are divided too.
    """
    found = channels(block, edge)
    source = block.module.get_submodule(edge.source)
    scale_C = scale_C.to(torch.float32)
    offset = 0.0 if isinstance(source, nn.Linear) else block.network.family.norm_offset
    for tensor in (_weight(source, edge.source), getattr(source, "bias", None)):
        if tensor is not None:
            shift = offset if tensor is source.weight else 0.0
            part = tensor.data[found.first :]
            part.copy_((part.float() + shift) / scale_C.view(-1, *[1] * (part.ndim - 1)) - shift)
    scale_I = found.spread(scale_C)
    for name in edge.sinks:
        weight_OI = _weight(block.module.get_submodule(name), name)
        weight_OI.data.copy_(weight_OI.data.float() * scale_I)


def _head_width(attention: nn.Module) -> int:
    width = getattr(attention, "head_dim", None)
    if not isinstance(width, int):
        raise AerogelError(f"{type(attention).__name__} shares value heads but has no head_dim to tell them apart; drop the edge")
    return width


def _columns(block: Block, edge: BoundEdge) -> int:
    widths = {_weight(block.module.get_submodule(name), name).shape[-1] for name in edge.sinks}
    if len(widths) != 1:
        source = block.full_name(edge.source)
        raise AerogelError(f"the sinks of {source} read {sorted(widths)} columns, one width was expected; correct the family file")
    return int(widths.pop())


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = None if isinstance(module, QuantLinear) else getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise AerogelError(f"{name} is quantized already and cannot be scaled; fold before the block is quantized")
    return weight
