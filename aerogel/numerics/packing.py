"""Packing of integer codes in int32 words, of fp4 codes in bytes, and of power-of-two scales as exponents.

The layout is that of compressed-tensors: a word holds floor(32 / bits) integer codes, the first in the lowest bits, each moved to be
non-negative; bits that are left over are zero.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from aerogel.errors import AerogelError


def pack(codes_OI: Tensor, bits: int, packed_dim: int = 1) -> Tensor:
    """Pack signed integer codes (O, I) into int32 words (O, ceil(I / (32 // bits))), or along the rows with packed_dim=0.

    Leading dimensions (experts) are kept. Raises AerogelError on a code that does not fit.
    """
    codes = codes_OI.transpose(-1, -2) if packed_dim == 0 else codes_OI
    per_word, half = 32 // bits, 1 << (bits - 1)
    if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
        raise AerogelError(
            f"cannot pack: integer codes lie in [{int(codes.min())}, {int(codes.max())}], {bits} bits hold [{-half}, {half - 1}]"
        )
    words = torch.zeros(*codes.shape[:-1], -(-codes.shape[-1] // per_word), dtype=torch.int32, device=codes.device)
    moved = torch.empty_like(words)  # one buffer for all places: many of this size would scatter over the heap
    for place in range(per_word):
        field = codes[..., place::per_word]
        here = moved[..., : field.shape[-1]]
        here.copy_(field).add_(half).bitwise_left_shift_(bits * place)
        words[..., : field.shape[-1]].bitwise_or_(here)
    return words.transpose(-1, -2).contiguous() if packed_dim == 0 else words


def unpack(packed: Tensor, bits: int, columns: int, packed_dim: int = 1) -> Tensor:
    """Return the int8 codes of `pack`; `columns` is the length of the packed dimension before packing."""
    words = packed.transpose(-1, -2) if packed_dim == 0 else packed
    per_word, half = 32 // bits, 1 << (bits - 1)
    codes = torch.empty(*words.shape[:-1], columns, dtype=torch.int8, device=words.device)
    if 8 % bits == 0 and sys.byteorder == "little":  # no code crosses a byte: bytes are words too, and four times as fast
        words, per_word = words.contiguous().view(torch.uint8), 8 // bits
    moved = torch.empty_like(words)
    for place in range(per_word):
        field = codes[..., place::per_word]
        here = torch.bitwise_right_shift(words, bits * place, out=moved)[..., : field.shape[-1]]
        field.copy_(here.bitwise_and_((1 << bits) - 1)).sub_(half)
    return codes.transpose(-1, -2).contiguous() if packed_dim == 0 else codes


def pack_fp4(codes_OI: Tensor) -> Tensor:
    """Pack fp4 codes (O, I) into bytes (O, I / 2), the even column in the low half; raises AerogelError when I is odd."""
    if codes_OI.shape[-1] % 2:
        raise AerogelError(f"cannot pack fp4: a row has {codes_OI.shape[-1]} values, expected an even number")
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Return the uint8 codes (O, I) of `pack_fp4`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_e8m0(scale: Tensor) -> Tensor:
    """Return power-of-two scales as uint8 exponents with bias 127."""
    return (torch.frexp(scale.float()).exponent + 126).to(torch.uint8)


def unpack_e8m0(exponent: Tensor) -> Tensor:
    """Return the float32 scales of `pack_e8m0`."""
    return torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent.int() - 127)


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the order of its values, as uint8 in one dimension, where it is."""
    flat = tensor.detach().reshape(-1)
    # A single value that was expanded keeps a stride of 0, also through .contiguous(), and cannot be viewed as bytes.
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
