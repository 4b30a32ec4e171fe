"""Kernel for quantized inputs and weights: an exact product of integers; T rows, O outputs, I inputs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.scheme import PerChannel, PerTensor, PerToken, TensorScheme

_CUDA_ROWS = 17
"""The fewest rows that torch's integer product takes on CUDA."""

CHUNK_ROWS = 512
"""Rows at a time on a CPU: 2048 at once took 1.0 to 1.8 times as long, the more outputs the worse."""


def accepted(weight: Weight, device: torch.device) -> bool:
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


class Int8(Kernel):
    """Sums products of int8 codes in int32, exactly, and scales once: only the last two roundings differ from the reference."""

    name = "int8"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """See accepted()."""
        return accepted(weight, device)

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        inputs, input_grid = weight.scheme.inputs, weight.input_grid()
        assert inputs is not None, "accepts() said so"
        self.inputs = inputs
        self.register_buffer("codes", weight.codes().detach())
        self.register_buffer("scale_O", weight.grid().scale.reshape(-1).float())
        self.register_buffer("input_scale", None if input_grid is None else input_grid.scale.reshape(-1, 1).float())
        self.register_buffer("bias", None if weight.bias is None else weight.bias.detach().float())
        self.codes: Tensor
        self.scale_O: Tensor
        self.input_scale: Tensor | None
        self.bias: Tensor | None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Quantize rows, multiply integers, scale; on a CPU some rows at a time, so that what is in between stays in the cache."""
        if x_TI.device.type != "cpu" or len(x_TI) <= CHUNK_ROWS:
            return self._rows(x_TI).to(x_TI.dtype)
        y_TO = x_TI.new_empty(len(x_TI), len(self.codes))
        for x, y in zip(x_TI.split(CHUNK_ROWS), y_TO.split(CHUNK_ROWS), strict=True):
            y.copy_(self._rows(x))
        return y_TO

    def _rows(self, x_TI: Tensor) -> Tensor:
        return multiplied(x_TI, self.inputs, self.codes, self.scale_O, self.input_scale, self.bias)


def traced(x: Tensor, weight: Weight) -> Tensor:
    """Return what Int8 does for x (..., I), in operations that torch.compile can trace and fuse."""
    x_TI, inputs, input_grid = x.reshape(-1, weight.in_features), weight.scheme.inputs, weight.input_grid()
    assert inputs is not None, "accepted() said so"
    input_scale = None if input_grid is None else input_grid.scale.reshape(-1, 1).float()
    scale_O, bias_O = weight.grid().scale.reshape(-1).float(), None if weight.bias is None else weight.bias.float()
    y_TO = multiplied(x_TI, inputs, weight.codes(), scale_O, input_scale, bias_O)
    return y_TO.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def multiplied(
    x_TI: Tensor, inputs: TensorScheme, codes_OI: Tensor, scale_O: Tensor, input_scale: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """Quantize rows (by their own scales where `input_scale` is None), multiply integers, scale; y_TO in float32."""
    scale_T1 = row_scales(x_TI, inputs) if input_scale is None else input_scale
    y_TO = torch.mul(integer_product(row_codes(x_TI, scale_T1, inputs), codes_OI), scale_T1).mul_(scale_O)
    if bias_O is not None:
        y_TO += bias_O
    return y_TO


def row_scales(x_TI: Tensor, inputs: TensorScheme) -> Tensor:
    """The scales of numerics.dynamic_grid, bit for bit, with one pass over the input."""
    scale_T1 = x_TI.abs().amax(dim=-1, keepdim=True).float() / ((inputs.format.high - inputs.format.low) / 2)
    return torch.where(scale_T1 == 0, torch.finfo(torch.float32).eps, scale_T1)


def row_codes(x_TI: Tensor, scale_T1: Tensor, inputs: TensorScheme) -> Tensor:
    """The int8 codes of rows."""
    return (x_TI / scale_T1).clamp_(inputs.format.low, inputs.format.high).round_().to(torch.int8)


@torch.compiler.assume_constant_result
def exact_on_cpu() -> bool:
    """Return True if this processor sums int8 products exactly; tried once."""
    return _tried()


@cache
def _tried() -> bool:
    # Without dot-product instructions libraries may add pairs of products in 16 bits, which saturates for extreme codes.
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
