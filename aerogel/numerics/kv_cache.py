"""Keys and values in few bits: unsigned codes with a scale and a smallest value for each run of numbers, and static fp8 scales.

B rows, H heads, T tokens, D channels, P bytes of packed codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.numerics.formats import FORMATS
from aerogel.numerics.quantize import to_codes

_E4M3 = FORMATS["fp8_e4m3"]
_LEAST = 2.0**-14
"""The least scale: the smallest normal number of float16."""


class Range(NamedTuple):
    """Grid of a run: value = code * scale + low, both in float16, which is enough up to 65,504."""

    scale: Tensor
    low: Tensor


def encode(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Range]:
    """Return the codes of `x`, uint8, and the range of each run along `dim`, which keeps a size of 1: min and max meet the ends (KIVI).

    The rounding of ranges to float16 comes first, so that codes are the nearest of the grid that is stored.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_LEAST).half()
    low = low.half()
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), Range(scale, low)


def decode(codes: Tensor, found: Range, dtype: torch.dtype) -> Tensor:
    """Return the values of codes, computed in float32."""
    return torch.addcmul(found.low.float(), codes.float(), found.scale.float()).to(dtype)


def pack_channels(codes_BHTD: Tensor, bits: int) -> Tensor:
    """Return codes packed in bytes, (B, H, T, D * bits / 8): a byte holds channels D * bits / 8 apart, the first in its low bits."""
    per_byte = 8 // bits
    parts = codes_BHTD.chunk(per_byte, dim=-1)
    packed_BHTP = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        packed_BHTP |= part << (bits * place)
    return packed_BHTP


def unpack_channels(packed_BHTP: Tensor, bits: int) -> Tensor:
    """Return the codes that `pack_channels` packed, uint8."""
    return packed_BHTP if bits == 8 else torch.cat(channel_runs(packed_BHTP, bits), dim=-1)


def channel_runs(packed_BHTP: Tensor, bits: int) -> list[Tensor]:
    """Return the same codes as runs of D * bits / 8 channels, which take no copy to lie beside each other."""
    if bits == 8:
        return [packed_BHTP]
    return [(packed_BHTP >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]


def static_scale(absmax: Tensor) -> Tensor:
    """Return the scale by which the largest number meets the end of e4m3's range, float32; 1 for nothing but zeros."""
    scale = absmax.float() / _E4M3.high
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def encode_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale in float8_e4m3fn; what is out of range saturates."""
    return to_codes(x.float() / scale, _E4M3)


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes * scale, computed in float32.

    On a CPU torch converts float8 number by number, 786,432 of them in 2.2 ms; moving the bits of e4m3 into those of float16, whose
    exponents begin 8 lower, takes 0.5 ms.
    """
    values, factor = fp8_values(codes)
    return (values.float() * (scale * factor)).to(dtype)


def fp8_values(codes: Tensor) -> tuple[Tensor, float]:
    """Return the values of codes over a factor, in a dtype that is converted fast, and the factor."""
    if codes.device.type != "cpu":
        return codes, 1.0
    moved = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)  # bit 14 is a copy of the sign
    return moved.view(torch.float16), 256.0
