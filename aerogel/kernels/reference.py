"""The reference kernels: quantize the input, dequantize the weight, multiply floats; every other kernel is their twin."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.functional import linear

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.quantize import dynamic_grid, fake_quantize


def reference(x: Tensor, weight: Weight) -> Tensor:
    """Return y (..., O) for x (..., I) with the arithmetic of numerics in x's dtype; differentiable in x."""
    inputs = weight.scheme.inputs
    if inputs is not None and x.numel():
        x = fake_quantize(x, weight.input_grid() or dynamic_grid(x, inputs), inputs)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return linear(x, weight.dequantized(x.dtype), bias)


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
        weight = self._weight()
        assert weight is not None, "a kernel of this kind is used by the weight it was made for"
        return reference(x_TI, weight)


class Wide(Reference):
    """The reference in float32, for 16-bit inputs on processors that multiply those slower than float32."""

    name = "wide"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """16-bit inputs on a CPU."""
        return device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply in float32 and round the output once."""
        return super().forward(x_TI.float()).to(x_TI.dtype)
