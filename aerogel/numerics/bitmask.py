"""A tensor as a bit mask and the values that are not zero; the mask has one bit an input, the first in the lowest bit of a byte.

A number is zero where all its bits are: -0.0 is kept as a value, so that the dense tensor comes back bit for bit. I inputs (the last
dimension), B bytes of the mask of a row: I / 8, rounded up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.errors import AerogelError

_BYTE = 8
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes, to look at the bits of other dtypes."""


class Masked(NamedTuple):
    """A tensor without its zeros."""

    mask: Tensor
    """(..., B), uint8."""
    values: Tensor
    """The other numbers, row by row, in the dtype of the tensor."""


def bytes_of(inputs: int) -> int:
    """Return the bytes that the mask of a row takes."""
    return -(-inputs // _BYTE)


def compress(dense: Tensor) -> Masked:
    """Return a tensor (..., I) as its mask and its values."""
    raw = dense.contiguous().view(_SAME_SIZE[dense.element_size()])
    kept = raw != 0
    return Masked(_packed(kept), raw[kept].view(dense.dtype))


def decompress(masked: Masked, inputs: int) -> Tensor:
    """Return the tensor (..., I) of a mask and its values.

    Raises AerogelError where there are not as many values as bits, or where bits behind the last input are set.
    """
    mask, values = masked
    kept = _unpacked(mask, inputs)
    if (wanted := int(kept.sum())) != len(values):
        raise AerogelError(f"its mask has {wanted} bits and there are {len(values)} values")
    if inputs % _BYTE and bool((mask[..., -1] >> inputs % _BYTE).any()):
        raise AerogelError(f"its mask has bits behind the {inputs} inputs of a row")
    raw = values.contiguous().view(_SAME_SIZE[values.element_size()])
    return torch.zeros(kept.shape, dtype=raw.dtype, device=raw.device).masked_scatter_(kept, raw).view(values.dtype)


def count(mask: Tensor, inputs: int) -> int:
    """Return how many values belong to a mask."""
    return int(_unpacked(mask, inputs).sum())


def _packed(kept: Tensor) -> Tensor:
    mask = torch.zeros(*kept.shape[:-1], bytes_of(kept.shape[-1]), dtype=torch.uint8, device=kept.device)
    for bit in range(min(_BYTE, kept.shape[-1])):
        part = kept[..., bit::_BYTE].to(torch.uint8)
        mask[..., : part.shape[-1]].bitwise_or_(part << bit)
    return mask


def _unpacked(mask: Tensor, inputs: int) -> Tensor:
    kept = torch.empty(*mask.shape[:-1], inputs, dtype=torch.bool, device=mask.device)
    for bit in range(min(_BYTE, inputs)):
        part = kept[..., bit::_BYTE]
        part.copy_((mask[..., : part.shape[-1]] >> bit).bitwise_and_(1))
    return kept
