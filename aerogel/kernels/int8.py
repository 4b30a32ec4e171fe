"""Kernel for quantized inputs and weights: an exact product of integers; T rows, O outputs, I inputs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.scheme import PerChannel, PerTensor, PerToken

_CUDA_ROWS = 17
"""The fewest rows that torch's integer product takes on CUDA."""


class Int8(Kernel):
    """Sums products of int8 codes in int32, exactly, and scales once: only the last two roundings differ from the reference."""

    name = "int8"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Symmetric integer weights with one scale a channel, symmetric int8 inputs with one scale a token or one in all."""
        weights, inputs = weight.scheme.weights, weight.scheme.inputs
        if inputs is None or inputs.format.name != "int8" or weights.format.kind != "int":
            return False
        if not (weights.symmetric and inputs.symmetric and isinstance(weights.granularity, PerChannel | PerTensor)):
            return False
        if not (isinstance(inputs.granularity, PerToken) or (isinstance(inputs.granularity, PerTensor) and not inputs.dynamic)):
            return False
        if device.type == "cuda":
            return weight.in_features % 8 == 0 and weight.out_features % 8 == 0
        return device.type == "cpu" and exact_on_cpu()

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        inputs, input_grid = weight.scheme.inputs, weight.input_grid()
        assert inputs is not None, "accepts() said so"
        self.low, self.high = inputs.format.low, inputs.format.high
        self.register_buffer("codes", weight.codes().detach())
        self.register_buffer("scale_O", weight.grid().scale.reshape(-1).float())
        self.register_buffer("input_scale", None if input_grid is None else input_grid.scale.reshape(-1, 1).float())
        self.register_buffer("bias", None if weight.bias is None else weight.bias.detach().float())
        self.codes: Tensor
        self.scale_O: Tensor
        self.input_scale: Tensor | None
        self.bias: Tensor | None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Quantize rows, multiply integers, scale."""
        scale_T1 = self._row_scales(x_TI) if self.input_scale is None else self.input_scale
        codes_TI = (x_TI / scale_T1).clamp_(self.low, self.high).round_().to(torch.int8)
        y_TO = torch.mul(integer_product(codes_TI, self.codes), scale_T1).mul_(self.scale_O)
        if self.bias is not None:
            y_TO += self.bias
        return y_TO.to(x_TI.dtype)

    def _row_scales(self, x_TI: Tensor) -> Tensor:
        """The scales of numerics.dynamic_grid, bit for bit, with one pass over the input."""
        scale_T1 = x_TI.abs().amax(dim=-1, keepdim=True).float() / ((self.high - self.low) / 2)
        return torch.where(scale_T1 == 0, torch.finfo(torch.float32).eps, scale_T1)


@cache
def exact_on_cpu() -> bool:
    """Whether this processor sums int8 products exactly.

    Without dot-product instructions libraries may add pairs of products in 16 bits, which saturates for extreme codes; so those are tried.
    """
    x_TI = torch.full((5, 192), -128, dtype=torch.int8)
    x_TI[::2] = 127
    codes_OI = torch.full((48, 192), -128, dtype=torch.int8)
    codes_OI[1::2] = 127
    wanted = x_TI.double() @ codes_OI.double().T
    return all(torch.equal(integer_product(x_TI[:rows], codes_OI).double(), wanted[:rows]) for rows in (1, 5))


def integer_product(x_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """Return x_TI @ codes_OI.T in int32."""
    rows = len(x_TI)
    if x_TI.device.type == "cuda" and rows < _CUDA_ROWS:
        x_TI = pad(x_TI, (0, 0, 0, _CUDA_ROWS - rows))
    return torch._int_mm(x_TI, codes_OI.T)[:rows]
