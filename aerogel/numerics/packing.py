"""Packing of integer codes in int32 words, of fp4 codes in bytes, and of power-of-two scales as exponents.

The layout of words is that of compressed-tensors since 0.18: the codes of a row, each moved to be non-negative, follow one another in the
bits of the words, the first in the lowest bits; a code of 3, 5, 6 or 7 bits may begin in one word and end in the next. Before, a word held
floor(32 / bits) whole codes and the bits that were left over were zero.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from aerogel.errors import AerogelError


def words_of(count: int, bits: int) -> int:
    """Return the number of int32 words that so many codes take."""
    return -(-count * bits // 32)


def pack(codes_OI: Tensor, bits: int, packed_dim: int = 1) -> Tensor:
    """Pack signed integer codes (O, I) into int32 words (O, ceil(I x bits / 32)), or along the rows with packed_dim=0.

    Leading dimensions (experts) are kept. Raises AerogelError on a code that does not fit.
    """
    codes = codes_OI.transpose(-1, -2) if packed_dim == 0 else codes_OI
    half = 1 << (bits - 1)
    if codes.numel() and not codes.is_meta and not -half <= int(codes.min()) <= int(codes.max()) < half:
        raise AerogelError(
            f"cannot pack: integer codes lie in [{int(codes.min())}, {int(codes.max())}], {bits} bits hold [{-half}, {half - 1}]"
        )
    words = torch.zeros(*codes.shape[:-1], words_of(codes.shape[-1], bits), dtype=torch.int32, device=codes.device)
    period, step = _period(bits)
    moved, shifted = torch.empty_like(words), torch.empty_like(words)  # for all places: many of this size would scatter over the heap
    for place in range(min(period, codes.shape[-1])):
        field, (word, shift) = codes[..., place::period], divmod(bits * place, 32)
        here, there = moved[..., : field.shape[-1]], shifted[..., : field.shape[-1]]
        here.copy_(field).add_(half)
        _part(words, word, step, here).bitwise_or_(torch.bitwise_left_shift(here, shift, out=there))
        if shift + bits > 32:
            _part(words, word + 1, step, here).bitwise_or_(torch.bitwise_right_shift(here, 32 - shift, out=there))
    return words.transpose(-1, -2).contiguous() if packed_dim == 0 else words


def unpack(packed: Tensor, bits: int, columns: int, packed_dim: int = 1) -> Tensor:
    """Return the int8 codes of `pack`; `columns` is the length of the packed dimension before packing."""
    words = packed.transpose(-1, -2) if packed_dim == 0 else packed
    codes = torch.empty(*words.shape[:-1], columns, dtype=torch.int8, device=words.device)
    (period, step), width = _period(bits), 32
    if 8 % bits == 0 and sys.byteorder == "little":  # no code crosses a byte: bytes are words too, and four times as fast
        words, period, width = words.contiguous().view(torch.uint8), 8 // bits, 8
    moved, crossing = torch.empty_like(words), torch.empty_like(words)
    for place in range(min(period, columns)):
        field, (word, shift) = codes[..., place::period], divmod(bits * place, width)
        here, there = moved[..., : field.shape[-1]], crossing[..., : field.shape[-1]]
        torch.bitwise_right_shift(_part(words, word, step, field), shift, out=here)
        if shift + bits > width:
            torch.bitwise_left_shift(_part(words, word + 1, step, field), width - shift, out=there)
            here.bitwise_and_((1 << (width - shift)) - 1).bitwise_or_(there)  # a shift to the right has copied the sign
        field.copy_(here.bitwise_and_((1 << bits) - 1)).sub_(1 << (bits - 1))
    return codes.transpose(-1, -2).contiguous() if packed_dim == 0 else codes


def unpack_padded(packed: Tensor, bits: int, columns: int, packed_dim: int = 1) -> Tensor:
    """Return the int8 codes of words that hold floor(32 / bits) whole codes each, as before compressed-tensors 0.18."""
    words = packed.transpose(-1, -2) if packed_dim == 0 else packed
    shift = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shift).bitwise_and_((1 << bits) - 1).flatten(-2)[..., :columns] - (1 << (bits - 1))
    return (codes.transpose(-1, -2) if packed_dim == 0 else codes).to(torch.int8).contiguous()


def _period(bits: int) -> tuple[int, int]:
    """Return after how many codes, and how many words, a code begins at the start of a word again."""
    return 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)


def _part(words: Tensor, first: int, step: int, codes: Tensor) -> Tensor:
    """Return every so many words, as many as there are codes."""
    return words[..., first::step][..., : codes.shape[-1]]


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
