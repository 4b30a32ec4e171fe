"""Weight-only kernel: torch's packed int4 product, with bfloat16 inputs and scales; wider integer codes are two nibbles.

Letters in names: T rows, O outputs, I inputs, G groups of the kernel. torch multiplies by (nibble - 8) * scale + offset with groups of
32 to 256 inputs and outputs in sixteens; other shapes are padded here, other groups are split.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerBlock

_GROUPS = (256, 128, 64, 32)
_INNER_TILES = 2
"""CUDA's packing interleaves this many tiles of 16 inputs; two of them make the smallest group."""


def kernel_group(in_features: int, span: int) -> int | None:
    """Return the kernel's group for scales that span `span` inputs: the largest that needs no padding; None when none fits."""
    fits = [size for size in _GROUPS if span % size == 0 or span >= in_features]
    return next((size for size in fits if in_features % size == 0), fits[-1] if fits else None)


class Int4(Kernel):
    """Reads 4 bits a weight, or twice that for codes of more than 4 bits: the fastest where reading the weight takes all the time.

    Inputs, scales and outputs are rounded to bfloat16 whatever the input's dtype: about 3e-3 of the reference, in norm.
    """

    name = "int4"
    few_rows = True

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Integer weights with float inputs, in channels or in groups of a multiple of 32."""
        scheme, tensor = weight.scheme, weight.scheme.weights
        if device.type not in ("cpu", "cuda") or scheme.inputs is not None or tensor.format.kind != "int":
            return False
        span = scheme.group or weight.in_features
        if isinstance(tensor.granularity, PerBlock) or kernel_group(weight.in_features, span) is None:
            return False
        return weight.g_idx is None or bool((torch.bincount(weight.g_idx)[:-1] == span).all())

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        span = weight.scheme.group or weight.in_features
        group = kernel_group(weight.in_features, span)
        assert group is not None, "accepts() said so"
        self.out_features, self.group, self.halves = weight.out_features, group, 1 if weight.scheme.bits <= 4 else 2
        order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True)
        nibbles_OI = _nibbles(weight.codes() if order is None else weight.codes()[:, order], self.halves)
        scales_OG2 = _scales(weight.grid(), weight.out_features, self.halves)
        self.padding = -weight.in_features % group
        more_rows = -len(nibbles_OI) % 16
        starts_G = torch.arange(0, weight.in_features, group, device=nibbles_OI.device) // span
        scales_OG2 = pad(scales_OG2[:, starts_G.clamp(max=scales_OG2.shape[1] - 1)], (0, 0, 0, 0, 0, more_rows))
        self.register_buffer("order", order)
        self.register_buffer("packed", _pack(pad(nibbles_OI, (0, self.padding, 0, more_rows))))
        self.register_buffer("scales", scales_OG2.transpose(0, 1).contiguous().bfloat16())
        self.register_buffer("bias", None if weight.bias is None else weight.bias.detach().to(dtype))
        self.order: Tensor | None
        self.packed: Tensor
        self.scales: Tensor
        self.bias: Tensor | None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply; see the class for the rounding."""
        x = x_TI.bfloat16() if self.order is None else x_TI.bfloat16().index_select(1, self.order)
        if self.padding:
            x = pad(x, (0, self.padding))
        both_TO = _multiply(x.contiguous(), self.packed, self.group, self.scales).to(x_TI.dtype)
        y_TO = both_TO[:, : self.out_features]
        if self.halves == 2:
            y_TO = y_TO + both_TO[:, self.out_features : 2 * self.out_features]
        return y_TO if self.bias is None else y_TO + self.bias


def _nibbles(codes_OI: Tensor, halves: int) -> Tensor:
    """Codes as numbers in 0..15; integer codes of more than 4 bits as two rows of them, code = 16 * (high - 8) + low."""
    codes_OI = codes_OI.to(torch.int32)
    return codes_OI + 8 if halves == 1 else torch.cat(((codes_OI >> 4) + 8, codes_OI & 15))


def _scales(grid: Grid, rows: int, halves: int) -> Tensor:
    """The (scale, offset) by which torch's product turns nibbles into numbers: (nibble - 8) * scale + offset."""
    scale_OG = _matrix(grid.scale, rows)
    offset_OG = torch.zeros_like(scale_OG) if grid.zero is None else -_matrix(grid.zero, rows) * scale_OG
    if halves == 2:
        scale_OG, offset_OG = torch.cat((16 * scale_OG, scale_OG)), torch.cat((offset_OG, 8 * scale_OG))
    return torch.stack((scale_OG, offset_OG), dim=-1)


def _matrix(grid_tensor: Tensor, rows: int) -> Tensor:
    return grid_tensor.float().reshape(-1, grid_tensor.shape[-1] if grid_tensor.ndim > 1 else 1).expand(rows, -1)


def _pack(nibbles_OI: Tensor) -> Tensor:
    if nibbles_OI.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_OI, 1)
    bytes_OI = (nibbles_OI[:, ::2] << 4 | nibbles_OI[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(bytes_OI, _INNER_TILES)


def _multiply(x_TI: Tensor, packed: Tensor, group: int, scales_GO2: Tensor) -> Tensor:
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if x_TI.device.type == "cpu" else torch.ops.aten._weight_int4pack_mm
    return multiply(x_TI, packed, group, scales_GO2)
