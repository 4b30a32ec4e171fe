"""Base of a kernel: one way to multiply by a quantized weight, packed once, called many times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import Scheme

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}
"""Activations that may follow a product in the same kernel."""


class Weight(Protocol):
    """A quantized linear as kernels see it: integer codes, a grid, perhaps a bias."""

    scheme: Scheme
    in_features: int
    out_features: int

    @property
    def bias(self) -> Tensor | None:
        """The bias_O, or None."""

    @property
    def g_idx(self) -> Tensor | None:
        """The group of each column (I) where groups follow activation order, else None."""

    def codes(self) -> Tensor:
        """The codes_OI, one code an element."""

    def grid(self) -> Grid:
        """Scales and zero points of the weight."""

    def input_grid(self) -> Grid | None:
        """Scale of static inputs, or None."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The float weight_OI that the integer codes stand for."""


class Kernel(nn.Module):
    """A packed weight: called with x_TI it returns y_TO in x's dtype, bias included.

    It is a module so that torch.compile sees its tensors; it is never part of a state dict. A kernel that keeps a stored tensor keeps it
    detached: no copy, and another object than the one whose end empties the weight's cache.
    """

    name: ClassVar[str]
    few_rows: ClassVar[bool] = False
    """True where its time grows with the rows so fast that a loss at some row count means a loss at any larger one."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        """Pack `weight` for inputs of `dtype`."""
        super().__init__()

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Return True if this kernel multiplies inputs of `dtype` on `device` by `weight` as exactly as the reference."""
        raise TypeError("a kernel says what it accepts")

    def followed(self, x_TI: Tensor, after: str) -> Tensor:
        """The product and the activation `after` it, in x's dtype."""
        return ACTIVATIONS[after](self(x_TI))
