"""The reference kernels: quantize the input, dequantize the weight, multiply floats; every other kernel is their twin."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.functional import linear

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.quantize import Grid, dequantize, dynamic_grid, fake_quantize
from aerogel.numerics.scheme import PerBlock

SLICE_VALUES = 2**21
"""Weights dequantized at once, 8 MiB of float32: fewer make the product slow, more leave the cache."""


def reference(x: Tensor, weight: Weight) -> Tensor:
    """Return y (..., O) for x (..., I) with the arithmetic of numerics in x's dtype; differentiable in x."""
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return linear(quantized_input(x, weight), weight.dequantized(x.dtype), bias)


def quantized_input(x: Tensor, weight: Weight) -> Tensor:
    """Round x (..., I) to the grid of the scheme's inputs; `x` itself when inputs stay float."""
    inputs = weight.scheme.inputs
    return x if inputs is None or not x.numel() else fake_quantize(x, weight.input_grid() or dynamic_grid(x, inputs), inputs)


class Reference(Kernel):
    """Dequantizes on every call, so that it costs no memory; for many rows that is a small part of the time."""

    name = "reference"

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._weight = weakref.ref(weight)  # the weight owns the cache that owns this kernel: a cycle would keep large tensors alive

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Everything."""
        return True

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply in the dtype of the input."""
        return reference(x_TI, self.weight)

    @property
    def weight(self) -> Weight:
        """The weight it was made for."""
        weight = self._weight()
        assert weight is not None, "a kernel of this kind is used by the weight it was made for"
        return weight


class Sliced(Reference):
    """The reference in float32, some output rows at a time: what is dequantized is multiplied while it is still in the cache.

    Closer to exact than the reference for 16-bit inputs, and faster where a processor multiplies those slower than float32.
    """

    name = "sliced"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Everything on a CPU but blocks, whose scales are shared by rows."""
        return device.type == "cpu" and not isinstance(weight.scheme.weights.granularity, PerBlock)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply in float32 and round the output once."""
        weight = self.weight
        x = quantized_input(x_TI.float(), weight)
        codes_OI, grid, g_idx = weight.codes(), weight.grid(), weight.g_idx
        y_TO = x.new_empty(len(x), weight.out_features)
        step = max(SLICE_VALUES // weight.in_features, 1)
        for start in range(0, weight.out_features, step):
            rows = slice(start, start + step)
            scale, zero = (part[rows] if part is not None and part.ndim else part for part in (grid.scale, grid.zero))
            assert scale is not None, "the first of the two is always there"
            part_OI = dequantize(codes_OI[rows], Grid(scale, zero, grid.outer), weight.scheme.weights, torch.float32, g_idx)
            y_TO[:, rows] = linear(x, part_OI)
        if weight.bias is not None:
            y_TO += weight.bias
        return y_TO.to(x_TI.dtype)
