"""Ranges of numbers: NaN and infinity, and finite numbers that the dtype they are cast to does not hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.errors import AerogelError

ADVICE = "compute in bfloat16 (--dtype bfloat16) or float32"
"""Remedy where float16 does not hold a number: the one dtype of 16 bits with the range of float32."""


def is_sound(tensor: Tensor, limit: bool = False) -> bool:
    """Return True for numbers without a NaN, and without an infinity unless they are a limit such as that of a clamp."""
    return all(math.isfinite(extreme) or (limit and not math.isnan(extreme)) for extreme in _extremes(tensor))


def beyond(tensor: Tensor, dtype: torch.dtype) -> float | None:
    """Return the largest magnitude of finite numbers that become infinite in another dtype; None where none does."""
    if not tensor.is_floating_point() or dtype.itemsize < 2 or not narrows(tensor.dtype, dtype):
        return None
    largest = max(map(abs, _extremes(tensor)), default=0.0)
    cast = torch.tensor(largest, dtype=torch.float64).to(dtype)
    return largest if math.isfinite(largest) and math.isinf(float(cast)) else None


def require_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise AerogelError, with the name and the number, where a dtype that a tensor is cast to does not hold it."""
    if (largest := beyond(tensor, dtype)) is not None:
        raise AerogelError(f"{name} reaches {largest:.5g}, and {ends_at(dtype)}; {ADVICE}")


def narrows(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Return True where a dtype has less range than the one that numbers are stored in, as float16 has less than bfloat16."""
    return dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(stored).max / 2


def ends_at(dtype: torch.dtype) -> str:
    """Return the largest number of a dtype in words."""
    return f"{str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:,.0f}"


def _extremes(tensor: Tensor) -> tuple[float, ...]:
    """The least and the largest number, which are NaN when any number is; they need no memory, and float8 has none of its own."""
    if not tensor.numel():
        return ()
    low, high = torch.aminmax(tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor)
    return low.item(), high.item()
