"""Edges: whose output channels feed whose input columns, and the folding of scales along them.

Legend: R rows of a source, C channels of an edge (the rows that take a scale), I input columns of a sink.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear


@dataclass(frozen=True, eq=False)
class Edge:
    """Channels that leave norms or linear layers and enter linear layers, by names in the block."""

    sources: tuple[str, ...]
    """Mostly one; several where sinks read them one beside the other, such as the values of text and of image."""
    sinks: tuple[str, ...]
    """Every layer that reads the channels, routers included."""
    rows_I: Tensor
    """For each column of a sink the row of the source that feeds it; -1 for a column that something else feeds."""
    offset: float = 0.0
    """Number added to a norm's weight, or to the rows of a modulation, before it multiplies."""
    power: int = 1
    """2 where sinks read the square of the source."""
    added_I: Tensor | None = None
    """For each column of a sink the row of the source that is added to it, where the source is a modulation of adaLN, whose other rows
    multiply; None for every other source."""

    @property
    def rows_C(self) -> Tensor:  # noqa: N802
        """The rows of the source that take a scale, in order."""
        return self.rows_I[self.rows_I >= 0].unique()

    @property
    def added_C(self) -> Tensor | None:  # noqa: N802
        """The rows of the source that are added, one for each channel."""
        if self.added_I is None:
            return None
        fed_I = self.rows_I >= 0
        return self.added_I.new_zeros(len(self.rows_C)).scatter(0, self.channels_I[fed_I], self.added_I[fed_I])

    @property
    def channels_I(self) -> Tensor:  # noqa: N802
        """For each column of a sink the channel that feeds it, -1 for none."""
        return torch.where(self.rows_I >= 0, torch.searchsorted(self.rows_C, self.rows_I.clamp(min=0)), -1)


def fold(block: nn.Module, edge: Edge, scale_C: Tensor) -> None:
    """Divide the source's channels by `scale_C` and multiply the columns that read them, in place: the block gives what it gave.

    The scales are positive. Biases of the source are divided too; a norm's offset is taken into account. Raises AerogelError where a layer
    is quantized already.
    """
    for name in (*edge.sources, *edge.sinks):
        if isinstance(block.get_submodule(name), QuantLinear):
            raise AerogelError(f"{name} is quantized already and cannot be scaled; fold before the block is quantized")
    root_C = scale_C ** (1 / edge.power)
    for name in edge.sources:
        _divide(block.get_submodule(name), edge, root_C)
    scale_I = spread(edge, scale_C)
    for name in edge.sinks:
        columns: Tensor = block.get_submodule(name).get_parameter("weight").data
        factor = scale_I.to(device=columns.device).view(1, -1, *[1] * (columns.ndim - 2))
        if columns.dtype == torch.float64:
            columns.mul_(factor)
        else:
            columns.copy_(columns.float() * factor.float())


def _divide(source: nn.Module, edge: Edge, root_C: Tensor) -> None:
    """Divide what a source gives, in place."""
    added_C = edge.added_C
    for key in ("weight", "bias"):
        parameter = getattr(source, key, None)
        if parameter is None:
            continue
        # The offset of a norm is added to its weight, that of a modulation to what the layer gives.
        offset = edge.offset if (key == "bias") == (added_C is not None) else 0.0
        for rows_C, of_these in ((edge.rows_C, offset), *([] if added_C is None else [(added_C, 0.0)])):
            data, rows_C = parameter.data, rows_C.to(parameter.device)
            part = _wide(data[rows_C])
            divisor = root_C.to(part).view(-1, *[1] * (part.ndim - 1))
            data[rows_C] = ((part + of_these) / divisor - of_these).to(data.dtype)


def spread(edge: Edge, values_C: Tensor, missing: float = 1.0) -> Tensor:
    """One value for each column of a sink; `missing` for those that the edge does not feed."""
    channels_I = edge.channels_I.to(values_C.device)
    return torch.where(channels_I >= 0, values_C[channels_I.clamp(min=0)], missing)


def gather(edge: Edge, values_I: Tensor) -> Tensor:
    """The largest value among the columns that read a channel: values_C."""
    channels_I = edge.channels_I.to(values_I.device)
    fed_I = channels_I >= 0
    largest_C = torch.full((len(edge.rows_C),), -torch.inf, dtype=values_I.dtype, device=values_I.device)
    return largest_C.scatter_reduce(0, channels_I[fed_I], values_I[fed_I], "amax")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
