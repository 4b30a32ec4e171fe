"""Chains over large tensors in one pass over memory, compiled by torch.compile where that works: codes of inputs, gated activations.

Written in torch alone quantizing takes five passes: with these it was a fifth of the time of an integer UNet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import gelu

FEWEST = 2**16
"""Below so many inputs all passes stay in the processor's cache, and a compiled call saves nothing."""


def codes_written_out(x_N: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """Return numerics' int8 codes of a row of floats, plus 128, under one scale and one zero point, tensors of one element."""
    return ((x_N.float() / scale + zero).clamp(low, high).round() + 128).to(torch.uint8)


def gated_written_out(x: Tensor) -> Tensor:
    """Return the first half of the last dimension times the GELU of the second."""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


@torch.no_grad()
def codes(x_N: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    """Return what `codes_written_out` does, where it `works`."""
    return compiled(codes_written_out)(x_N, scale, zero, low, high)


@torch.no_grad()
def gated(x: Tensor) -> Tensor:
    """Return what `gated_written_out` does but for one rounding less, where it `works`."""
    return compiled(gated_written_out)(x)


def takes(x: Tensor) -> bool:
    """Return True if one pass is possible and pays here: on a CPU, large, without gradients, and not inside another compilation."""
    plain = x.device.type == "cpu" and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad)
    return plain and x.numel() >= FEWEST and works()


@cache
def compiled(chain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(chain, dynamic=True, fullgraph=True)  # here, as it imports the compiler


@cache
def works() -> bool:
    """Return True if this machine compiles the chain to the same integer codes; tried once, which takes a few seconds.

    It does not where no C++ compiler is installed: callers then take the passes one by one.
    """
    given = (torch.linspace(-3, 3, FEWEST), torch.tensor([0.02]), torch.tensor([3.0]), -128, 127)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        try:
            made_N = codes(*given)
        except (RuntimeError, OSError):  # no compiler, one that fails, or no place for what it makes
            return False
    return torch.equal(made_N, codes_written_out(*given))
