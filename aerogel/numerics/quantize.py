"""From numbers to integer codes and back: grids of scales, the rounding of every format, straight-through gradients.

Letters in names: O outputs, I inputs, G groups of a row. All arithmetic is float32 whatever the tensor's dtype, and follows
compressed-tensors bit for bit: a symmetric integer scale is absmax / ((2^bits - 1) / 2), codes are rounded half to even after clamping.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aerogel.errors import AerogelError
from aerogel.numerics.formats import FORMATS, Format
from aerogel.numerics.scheme import Granularity, PerBlock, PerGroup, PerHead, PerStep, PerTensor, TensorScheme

_E4M3 = FORMATS["fp8_e4m3"]


class Grid(NamedTuple):
    """Grid of a tensor's integer codes: value = (code - zero) * scale, with the scale divided by `outer` when there is one."""

    scale: Tensor
    """float32, one for each run of the granularity: scale_OG for a weight."""
    zero: Tensor | None = None
    """int8 code that stands for 0.0, same shape as scale; None when symmetric."""
    outer: Tensor | None = None
    """float32 scalar that block scales were multiplied by before they were rounded to their own format (nv)."""

    @property
    def step(self) -> Tensor:
        """The distance between neighbouring integer codes: scale, or scale / outer."""
        return self.scale if self.outer is None else self.scale / self.outer


def grouped(x: Tensor, granularity: Granularity, fill: float = 0.0) -> Tensor:
    """Return `x` as (grid shape, n): the last dimension holds the numbers that share a scale; short runs are padded with `fill`.

    Zero is neutral for ranges (every range contains it) and for errors (every grid holds it exactly).
    """
    match granularity:
        case PerTensor() | PerStep():
            return x.flatten()
        case PerGroup(size):
            return pad(x, (0, -x.shape[-1] % size), value=fill).unflatten(-1, (-1, size))
        case PerBlock(rows, columns):
            x = pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows), value=fill)
            tiles = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
            return tiles.transpose(-3, -2).flatten(-2)
        case PerHead():  # (..., heads, tokens, channels) -> (heads, 1, 1, n)
            return x.movedim(-3, 0).flatten(1)[:, None, None]
        case _:  # PerChannel and PerToken: a row is a run
            return x.unsqueeze(-2)


def expand(grid_tensor: Tensor, columns: int, granularity: Granularity, rows: int | None = None, g_idx: Tensor | None = None) -> Tensor:
    """Spread scales or zero points so that they broadcast against the tensor they belong to.

    Groups become `columns` wide, blocks `rows` x `columns` (all whole blocks when rows is None), everything else broadcasts as it is.
    `g_idx` (I, integer) names the group of each column where columns were reordered.
    """
    if isinstance(granularity, PerGroup):
        if g_idx is not None:
            return grid_tensor.index_select(-1, g_idx)
        return grid_tensor.repeat_interleave(granularity.size, dim=-1)[..., :columns]
    if isinstance(granularity, PerBlock):
        tall = grid_tensor.repeat_interleave(granularity.rows, dim=-2)[..., :rows, :]
        return tall.repeat_interleave(granularity.columns, dim=-1)[..., :columns]
    return grid_tensor


def to_codes(scaled: Tensor, fmt: Format) -> Tensor:
    """Return the nearest integer codes (dtype `fmt.storage`) of values already divided by their scale; out of range saturates."""
    if fmt.levels is None:
        clamped = scaled.clamp(fmt.low, fmt.high)
        return (clamped.round() if fmt.kind == "int" else clamped).to(fmt.storage)
    levels = torch.tensor(fmt.levels, device=scaled.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = scaled.float().abs()
    below, above = torch.bucketize(magnitude, middles), torch.bucketize(magnitude, middles, right=True)
    index = torch.where(below % 2 == 0, below, above)  # they differ on a tie, which goes to the even index
    return (index + len(levels) * (scaled < 0)).to(fmt.storage)


def to_values(codes: Tensor, fmt: Format) -> Tensor:
    """Return the float32 values that integer codes stand for before scaling."""
    if fmt.levels is None:
        return codes.float()
    levels = torch.tensor(fmt.levels, device=codes.device)
    return torch.cat((levels, -levels))[codes.long()]


def grid_from_range(low: Tensor, high: Tensor, scheme: TensorScheme, outer: Tensor | None = None) -> Grid:
    """Return the grid that covers [low, high] and zero; an all-zero range gets a tiny scale, never zero or NaN.

    `outer` shares one outer scale between tensors (nv, arXiv:2509.25149); without it the tensor's own is made. Block scales in e8m0 are
    powers of two (OCP MX, arXiv:2310.10537), rounded up from 1.75 as compressed-tensors does.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not scheme.symmetric:
        return _asymmetric(low, high, scheme.format)
    absmax = torch.maximum(-low, high)
    if scheme.scale_format == "e8m0":
        return Grid(_power_of_two(absmax, scheme.format))
    scale = absmax / ((scheme.format.high - scheme.format.low) / 2)
    if scheme.scale_format == "float":
        return Grid(_nonzero(scale, torch.finfo(scale.dtype).eps))
    outer = outer_scale(absmax.amax(), scheme) if outer is None else outer
    scale = to_codes(scale * outer, _E4M3).float()
    return Grid(_nonzero(scale, 0.125), None, outer)


def outer_scale(absmax: Tensor, scheme: TensorScheme) -> Tensor:
    """Return the outer scale (nv) of numbers up to `absmax`, a float32 scalar: their largest block scale meets the end of e4m3's range."""
    outer = _E4M3.high * scheme.format.high / absmax.clamp(min=torch.finfo(absmax.dtype).tiny)
    return outer.nan_to_num(nan=1.0, posinf=1.0)


def _asymmetric(low: Tensor, high: Tensor, fmt: Format) -> Grid:
    scale = (high - low) / (fmt.high - fmt.low)
    scale = _nonzero(scale, torch.finfo(scale.dtype).eps)
    zero = (fmt.low - low / scale).clamp(fmt.low, fmt.high).round()
    return Grid(scale, zero.to(fmt.storage))


def _nonzero(scale: Tensor, least: float) -> Tensor:
    return torch.where(scale == 0, torch.full_like(scale, least), scale)


def _power_of_two(absmax: Tensor, fmt: Format) -> Tensor:
    mantissa, exponent = torch.frexp(absmax)  # mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa >= 0.875) - math.floor(math.log2(fmt.high))
    return torch.ldexp(torch.ones_like(absmax), exponent.clamp(-127, 127))


@torch.no_grad()
def weight_grid(weight_OI: Tensor, scheme: TensorScheme, outer: Tensor | None = None) -> Grid:
    """Return the min-max grid of a weight; the last group or block of a row may be short. `outer` is that of `grid_from_range`."""
    low, high = torch.aminmax(grouped(weight_OI, scheme.granularity), dim=-1)
    return grid_from_range(low, high, scheme, outer)


@torch.no_grad()
def dynamic_grid(x: Tensor, scheme: TensorScheme) -> Grid:
    """Return the min-max grid of an activation, made from the tensor itself at run time."""
    if not isinstance(scheme.granularity, PerTensor) and x.numel() == 0:
        raise AerogelError(f"cannot measure a range: activation of shape {tuple(x.shape)} is empty")
    low, high = torch.aminmax(grouped(x, scheme.granularity), dim=-1)
    return grid_from_range(low, high, scheme)


def _spread(x: Tensor, grid: Grid, scheme: TensorScheme, g_idx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows, columns = x.shape[-2:] if x.ndim > 1 else (None, x.shape[-1])
    step = expand(grid.step, columns, scheme.granularity, rows, g_idx)
    zero = None if grid.zero is None else expand(grid.zero, columns, scheme.granularity, rows, g_idx).float()
    return step, zero


def quantize(x: Tensor, grid: Grid, scheme: TensorScheme, g_idx: Tensor | None = None) -> Tensor:
    """Return the integer codes of `x`: same shape, dtype `scheme.format.storage`."""
    step, zero = _spread(x, grid, scheme, g_idx)
    scaled = x.float() / step
    return to_codes(scaled if zero is None else scaled + zero, scheme.format)


def dequantize(codes: Tensor, grid: Grid, scheme: TensorScheme, dtype: torch.dtype = torch.float32, g_idx: Tensor | None = None) -> Tensor:
    """Return the numbers that integer codes stand for, computed in float32 and rounded once to `dtype`."""
    step, zero = _spread(codes, grid, scheme, g_idx)
    values = to_values(codes, scheme.format)
    return ((values if zero is None else values - zero) * step).to(dtype)


class _Nearest(torch.autograd.Function):
    """Rounds to the values of a format; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, fmt: Format) -> Tensor:
        return to_values(to_codes(scaled, fmt), fmt)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantize(x: Tensor, grid: Grid, scheme: TensorScheme, g_idx: Tensor | None = None) -> Tensor:
    """Quantize and dequantize in one differentiable step, in x's dtype and with the values of `dequantize(quantize(x))`.

    The gradient to x is 1 inside the grid's range and 0 outside (arXiv:1308.3432). A grid whose scale requires a gradient gets that of
    LSQ (arXiv:1902.08153): rounding error inside, end code outside; a float zero point gets that of LSQ+ (arXiv:2004.09576).
    """
    step, zero = _spread(x, grid, scheme, g_idx)
    scaled = x.float() / step
    if zero is not None:
        scaled = scaled + zero
    values: Tensor = _Nearest.apply(scaled.clamp(scheme.format.low, scheme.format.high), scheme.format)
    return ((values if zero is None else values - zero) * step).to(x.dtype)
