"""Experts that no token reached in calibration: their static inputs get the range of the other experts of their layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.layers.scaled_input import ScaledInput
from aerogel.model.block import Block
from aerogel.numerics.quantize import Grid, grid_from_range
from aerogel.numerics.scheme import TensorScheme


@torch.no_grad()
def borrow_input_ranges(block: Block, unseen: Iterable[str]) -> None:
    """Give quantized experts, by name in the block, a range that covers those of all others that tokens reached.

    The tokens that come later are those that the others see; without this a range of its own would be made up, which saturates.
    """
    unseen = set(unseen)
    lists = {name: part for name, part in block.module.named_modules() if isinstance(part, ExpertList)}
    for name in unseen:
        layer = _quantized(block.module.get_submodule(name))
        others = [other for other in _beside(name, lists) if other not in unseen]
        grids = [grid for other in others if (grid := _quantized(block.module.get_submodule(other)).input_grid()) is not None]
        if grids and layer.scheme.inputs is not None:
            _put(layer, layer.scheme.inputs, grids)


def _beside(name: str, lists: dict[str, ExpertList]) -> Iterator[str]:
    """The same projection of every expert of a layer."""
    for home, experts in lists.items():
        if name.startswith(f"{home}."):
            number, _, projection = name.removeprefix(f"{home}.").partition(".")
            yield from (f"{home}.{other}.{projection}" for other in range(len(experts)) if str(other) != number)


def _quantized(part: nn.Module) -> QuantLinear:
    inner = part.inner if isinstance(part, ScaledInput) else part
    assert isinstance(inner, QuantLinear), "they were quantized just now"
    return inner


def _put(layer: QuantLinear, scheme: TensorScheme, grids: list[Grid]) -> None:
    ends = torch.stack([_ends(grid, scheme) for grid in grids])
    grid = stored_grid(grid_from_range(ends[:, 0].amin(), ends[:, 1].amax(), scheme), layer.get_buffer("input_scale").dtype)
    layer.get_buffer("input_scale").copy_(grid.scale)
    if grid.zero is not None:
        layer.get_buffer("input_zero_point").copy_(grid.zero)


def _ends(grid: Grid, scheme: TensorScheme) -> Tensor:
    """The least and the largest number of a grid."""
    codes = torch.tensor([scheme.format.low, scheme.format.high], device=grid.scale.device)
    zero = 0.0 if grid.zero is None else grid.zero.float()
    return ((codes - zero) * grid.scale).flatten()
