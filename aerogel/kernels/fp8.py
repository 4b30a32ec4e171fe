"""Kernel for fp8 codes of weights and inputs on GPUs that multiply them; T rows, O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.quantize import Grid, dynamic_grid, quantize
from aerogel.numerics.scheme import PerChannel, PerTensor, PerToken

_CAPABILITY = (8, 9)
"""The first CUDA generation with fp8 products."""


class Fp8(Kernel):
    """torch's scaled product of e4m3 codes, with one scale a row and a channel, or one scale each."""

    name = "fp8"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """e4m3 on both sides, scales by (token, channel) or (tensor, tensor), sides in sixteens, bfloat16 inputs, a GPU that can."""
        weights, inputs = weight.scheme.weights, weight.scheme.inputs
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY or dtype != torch.bfloat16:
            return False
        if inputs is None or {weights.format.name, inputs.format.name} != {"fp8_e4m3"}:
            return False
        grains = (type(weights.granularity), type(inputs.granularity))
        return grains in ((PerChannel, PerToken), (PerTensor, PerTensor)) and weight.in_features % 16 == weight.out_features % 16 == 0

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        assert weight.scheme.inputs is not None, "accepts() said so"
        self.inputs = weight.scheme.inputs
        input_grid = weight.input_grid()
        per_tensor = isinstance(weight.scheme.weights.granularity, PerTensor)
        scale = weight.grid().scale.float()
        self.register_buffer("codes", weight.codes().detach())
        self.register_buffer("scale", scale.reshape(()) if per_tensor else scale.reshape(1, -1))
        self.register_buffer("input_scale", None if input_grid is None else input_grid.scale.float().reshape(()))
        self.register_buffer("bias", None if weight.bias is None else weight.bias.detach().to(dtype))
        self.codes: Tensor
        self.scale: Tensor
        self.input_scale: Tensor | None
        self.bias: Tensor | None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Quantize the input, multiply codes."""
        grid = dynamic_grid(x_TI, self.inputs) if self.input_scale is None else Grid(self.input_scale)
        codes_TI = quantize(x_TI, grid, self.inputs)
        return torch._scaled_mm(codes_TI, self.codes.T, grid.scale, self.scale, bias=self.bias, out_dtype=x_TI.dtype)
