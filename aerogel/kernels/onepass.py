"""Codes of large inputs in one pass over memory, compiled by torch.compile where that works; the numbers are numerics.quantize's.

Written in torch alone the chain is five passes: with these, quantizing inputs took a fifth of the time of an integer UNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

FEWEST = 2**16
"""Below so many inputs all passes stay in the processor's cache, and a compiled call saves nothing."""


def written_out(x_N: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """Return the int8 codes of a row of floats under one scale and one zero point, tensors of one element."""
    return (x_N.float() / scale + zero).clamp(low, high).round().to(torch.int8)


@torch.no_grad()
def codes(x_N: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """Return what `written_out` does, where it `works`."""
    return _compiled()(x_N, scale, zero, low, high)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(written_out, dynamic=True, fullgraph=True)  # here, as it imports the compiler


@cache
def works() -> bool:
    """Whether this machine compiles the chain and gets the same codes by it; found out once, which takes a few seconds.

    It does not where no C++ compiler is installed: callers then take the passes one by one.
    """
    given = (torch.linspace(-3, 3, FEWEST), torch.tensor([0.02]), torch.tensor([3.0]), -128, 127)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        try:
            made_N = codes(*given)
        except (RuntimeError, OSError):  # no compiler, one that fails, or no place for what it makes
            return False
    return torch.equal(made_N, written_out(*given))
