"""oneDNN's products of unsigned inputs that have a zero point with signed weights: sums are exact, the scale is applied once.

O outputs, I inputs, T rows; integer codes are those of numerics, whose signed int8 becomes oneDNN's unsigned by adding 128.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels import onepass
from aerogel.kernels.kernel import Kernel, Weight
from aerogel.numerics.formats import Format
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerChannel, PerStep, PerTensor

_INT8 = torch.iinfo(torch.int8)
_BLOCK = 16
"""Outputs that oneDNN handles at once: one more than a multiple made a convolution 2.5 times as slow."""
CHUNK_VALUES = 2**19
"""Inputs that are quantized at once."""
_FLOATS = (torch.float32, torch.bfloat16)
_AFTER = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""Names of activations in oneDNN."""


def accepted(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where the inputs are static int8 under one scale and the weights integers under one scale a channel, on a CPU."""
    weights, inputs = weight.scheme.weights, weight.scheme.inputs
    if device.type != "cpu" or dtype not in _FLOATS or inputs is None or inputs.dynamic or inputs.format.name != "int8":
        return False
    static = isinstance(inputs.granularity, PerTensor | PerStep)
    return static and weights.format.kind == "int" and isinstance(weights.granularity, PerChannel) and exact()


@cache
def exact() -> bool:
    """Return True where this processor sums these products exactly.

    Without dot-product instructions libraries may add pairs of products in 16 bits, which saturates for extreme codes; so those are tried.
    """
    x_TI, codes_OI = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    codes_OI[1::2] = -128
    packed = torch.ops.onednn.qlinear_prepack(codes_OI, [4, 64])
    rest: tuple[Any, ...] = (torch.ones(16), torch.zeros(16, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "")
    linear = torch.ops.onednn.qlinear_pointwise(x_TI, 1.0, 0, packed, *rest)
    kernel_OCHW, moves = codes_OI.view(16, 64, 1, 1), ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(kernel_OCHW, torch.ones(16), 1.0, 0, *moves, [4, 64, 1, 1])
    head, tail = rest[:3], rest[3:]
    convolved = torch.ops.onednn.qconv2d_pointwise(x_TI.view(4, 64, 1, 1), 1.0, 0, packed, *head, *moves, *tail)
    wanted = x_TI.float() @ codes_OI.float().T
    return torch.equal(linear, wanted) and torch.equal(convolved.flatten(1), wanted)


class Signed(NamedTuple):
    """A weight as int8 without zero points; where these do not fit into the codes, a row of ones behind the outputs sums the inputs."""

    codes_OI: Tensor
    scale_O: Tensor
    zero_O: Tensor | None
    """Zero points that are still to be subtracted, times the sum of the inputs; None when nothing is."""


def signed(codes_OI: Tensor, grid: Grid) -> Signed:
    """Fold the zero points of a weight into its integer codes, or add the row that allows for them."""
    scale_O = grid.scale.reshape(-1).float()
    if grid.zero is None:
        return Signed(codes_OI.to(torch.int8), scale_O, None)
    zero_O = grid.zero.reshape(-1)
    moved = codes_OI.to(torch.int16) - zero_O.to(torch.int16)[:, None]
    if _INT8.min <= int(moved.min()) and int(moved.max()) <= _INT8.max:
        return Signed(moved.to(torch.int8), scale_O, None)
    more = _BLOCK - len(codes_OI) % _BLOCK
    ones = torch.zeros(more, codes_OI.shape[1], dtype=torch.int8)
    ones[0] = 1
    return Signed(torch.cat([codes_OI.to(torch.int8), ones]), torch.cat([scale_O, torch.ones(more)]), zero_O.float() * scale_O)


class Affine(Kernel):
    """A linear with static inputs."""

    name = "affine"

    @staticmethod
    def accepts(weight: Weight, device: torch.device, dtype: torch.dtype) -> bool:
        """Static int8 inputs under one scale, or one scale a step, with or without a zero point."""
        return accepted(weight, device, dtype)

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._weight = weakref.ref(weight)  # the weight owns the cache that owns this kernel
        self.rows = signed(weight.codes().detach(), weight.grid())
        self.packed = torch.ops.onednn.qlinear_prepack(self.rows.codes_OI, [1, weight.in_features])
        self.none = torch.zeros(len(self.rows.scale_O), dtype=torch.int32)
        self.bias = bias_of(weight, self.rows)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Quantize all rows with the scale of the step, multiply integers, scale."""
        return self._product(x_TI, "none", "")

    def followed(self, x_TI: Tensor, after: str) -> Tensor:
        """The activation is applied to float32 sums before they are rounded, save where zero points are still to be subtracted."""
        if self.rows.zero_O is not None:
            return super().followed(x_TI, after)
        return self._product(x_TI, *_AFTER[after])

    def _product(self, x_TI: Tensor, *after: str) -> Tensor:
        weight = self._weight()
        assert weight is not None, "a kernel of this kind is used by the weight it was made for"
        codes, scale, zero = quantized(x_TI, weight)
        kind = x_TI.dtype if self.rows.zero_O is None else torch.float32
        rest: tuple[Any, ...] = (self.packed, self.rows.scale_O, self.none, self.bias, 1.0, 0, kind, after[0], [], after[1])
        y = torch.ops.onednn.qlinear_pointwise(codes, scale, zero, *rest)
        return without_zeros(y, self.rows, 1).to(x_TI.dtype)


def bias_of(weight: Weight, rows: Signed) -> Tensor | None:
    """The float bias, with zeros for the rows that were added."""
    if weight.bias is None:
        return None
    bias_O = weight.bias.detach().float()
    return bias_O if rows.zero_O is None else torch.cat([bias_O, torch.zeros(len(rows.scale_O) - len(bias_O))])


class _Quantized(NamedTuple):
    """The input that was quantized last: query, key and value of an attention are often given the same one.

    Measured: three linear layers of 1,152 x 1,152 and 64 rows take 1.35 ms when each quantizes its input, and 0.94 ms so.
    """

    owner: weakref.ref[Tensor]
    """The tensor whose memory the input is a view of."""
    version: int
    layout: tuple[Any, ...]
    by: weakref.ref[Weight]
    grid: tuple[float, int]
    codes: Tensor

    def is_of(self, x: Tensor, weight: Weight, grid: tuple[float, int]) -> bool:
        """Return True where these are the integer codes of x; never for the layer they were made for, whose next input is new."""
        if self.by() is weight or self.grid != grid or x.is_inference():
            return False
        return self.owner() is _owner(x) and self.version == x._version and self.layout == _layout(x)


def _owner(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.storage_offset()


_last: _Quantized | None = None


def quantized(x: Tensor, weight: Weight) -> tuple[Tensor, float, int]:
    """Return unsigned integer codes of any layout with their scale and zero point; another layer may have them too: read only."""
    global _last
    grid, inputs = weight.input_grid(), weight.scheme.inputs
    assert grid is not None, "accepted() said so"
    assert inputs is not None, "accepted() said so"
    scale, zero = float(grid.scale), 128 if grid.zero is None else int(grid.zero) + 128
    last = _last  # read once: another thread may put its own there
    if last is not None and last.is_of(x, weight, (scale, zero)):
        return last.codes, scale, zero
    made = unsigned_codes(x, grid, inputs.format)
    if x.is_inference():  # such tensors have no version
        _last = None
    else:
        _last = _Quantized(weakref.ref(_owner(x)), x._version, _layout(x), weakref.ref(weight), (scale, zero), made)
    return made, scale, zero


def codes(x: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """Return the int8 codes of numerics.quantize under one scale, in x's order of memory."""
    return unsigned_codes(x, grid, fmt).bitwise_xor_(128).view(torch.int8)


def unsigned_codes(x: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """The same, plus 128."""
    x = x if dense(x) else x.contiguous()
    scale = grid.scale.float().reshape(1)  # of one dimension, so that the quotient has its dtype
    if onepass.takes(x):
        zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float().reshape(1)
        return onepass.codes(in_memory(x), scale, zero, fmt.low, fmt.high).as_strided(x.shape, x.stride())
    made = torch.empty_like(x, dtype=torch.int8)
    # Floats in 32 bits would be fetched from memory and written to it once an operation; a piece stays in the cache.
    for part, place in zip(in_memory(x).split(CHUNK_VALUES), in_memory(made).split(CHUNK_VALUES), strict=True):
        scaled = part / scale
        if grid.zero is not None:
            scaled += grid.zero
        place.copy_(scaled.clamp_(fmt.low, fmt.high).round_())
    return unsigned(made)


def unsigned(codes: Tensor) -> Tensor:
    """Add 128 to int8 codes in place; the highest bit is all that tells the two apart."""
    return codes.view(torch.uint8).bitwise_xor_(128)


def dense(x: Tensor) -> bool:
    """Return True where a tensor fills its memory, in whatever order."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def in_memory(x: Tensor) -> Tensor:
    """Return a dense tensor as one row, in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def without_zeros(y: Tensor, rows: Signed, channels: int) -> Tensor:
    """Subtract what the zero points of the weight add, by the sums of the inputs behind its outputs; these are dimension `channels`."""
    if rows.zero_O is None:
        return y
    count = len(rows.zero_O)
    shape: Sequence[int] = [-1 if dimension == channels else 1 for dimension in range(y.ndim)]
    return y.narrow(channels, 0, count) - y.narrow(channels, count, 1) * rows.zero_O.view(shape)
