"""Packed layouts, bit for bit with compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import AerogelError
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.packing import pack, pack_e8m0, pack_fp4, raw_bytes, unpack, unpack_e8m0, unpack_fp4, unpack_padded
from aerogel.numerics.quantize import to_codes, to_values
from tests.releases import DENSE


def literal(codes: list[int], bits: int) -> list[int]:
    """The codes as one long number, cut into words of 32 bits."""
    number = sum((code + 2 ** (bits - 1)) << (bits * place) for place, code in enumerate(codes))
    return [signed(number >> (32 * word)) for word in range(-(-len(codes) * bits // 32))]


def padded(codes: list[int], bits: int) -> list[int]:
    """The codes word by word, as many whole ones as fit."""
    return [word for start in range(0, len(codes), 32 // bits) for word in literal(codes[start : start + 32 // bits], bits)]


def signed(number: int) -> int:
    word = number & 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


@given(
    bits=st.integers(2, 8), rows=st.integers(1, 40), columns=st.integers(1, 40), packed_dim=st.sampled_from((0, 1)), seed=st.integers(0, 99)
)
def test_words_match_compressed_tensors(bits: int, rows: int, columns: int, packed_dim: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    words, along = pack(codes, bits, packed_dim), codes if packed_dim else codes.T
    assert words.is_contiguous()
    assert (words if packed_dim else words.T).tolist() == [literal(row, bits) for row in along.tolist()]
    assert torch.equal(unpack(words, bits, codes.shape[packed_dim], packed_dim), codes)
    theirs = pack_to_int32(codes, bits, packed_dim)
    if DENSE:
        assert torch.equal(words, theirs)
        assert torch.equal(unpack_from_int32(words, bits, codes.shape, packed_dim), codes)
    else:
        assert torch.equal(unpack_padded(theirs, bits, codes.shape[packed_dim], packed_dim), codes)


@given(bits=st.integers(2, 8), columns=st.integers(1, 40), packed_dim=st.sampled_from((0, 1)), seed=st.integers(0, 99))
def test_words_of_earlier_releases_are_read(bits: int, columns: int, packed_dim: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    words = torch.tensor([padded(row, bits) for row in codes.tolist()], dtype=torch.int32)
    given_codes, given_words = (codes, words) if packed_dim else (codes.T, words.T)
    assert torch.equal(unpack_padded(given_words, bits, columns, packed_dim), given_codes)


def test_experts_pack_one_by_one() -> None:
    codes = torch.randint(-8, 8, (3, 4, 20), dtype=torch.int8)
    assert torch.equal(pack(codes, 4), torch.stack([pack(expert, 4) for expert in codes]))
    assert torch.equal(unpack(pack(codes, 4, 0), 4, 4, 0), codes)
    codes = codes.clamp(-4, 3)
    assert torch.equal(pack(codes, 3), torch.stack([pack(expert, 3) for expert in codes]))
    assert torch.equal(unpack(pack(codes, 3, 0), 3, 4, 0), codes)


def test_a_code_of_three_bits_goes_on_in_the_next_word() -> None:
    words = pack(torch.full((1, 11), 3, dtype=torch.int8), 3)
    assert words.tolist() == [[-1, 1]]


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"\[-9, 1\], 4 bits hold \[-8, 7\]"):
        pack(torch.tensor([[-9, 1]], dtype=torch.int8), 4)


def test_fp4_bytes_match_compressed_tensors() -> None:
    codes = to_codes(torch.randn(6, 32) * 3, FORMATS["fp4_e2m1"])
    values = to_values(codes, FORMATS["fp4_e2m1"])
    packed = pack_fp4(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(unpack_fp4(packed), codes)
    assert torch.equal(unpack_fp4_from_uint8(packed, 6, 32, torch.float32), values)
    with pytest.raises(AerogelError, match="even"):
        pack_fp4(codes[:, :31])


def test_exponents_match_compressed_tensors() -> None:
    exponent = torch.arange(1, 255, dtype=torch.uint8)
    scale = unpack_e8m0(exponent)
    assert scale.tolist() == [2.0 ** (e - 127) for e in range(1, 255)]
    assert torch.equal(pack_e8m0(scale), exponent)
    assert torch.equal(compress_mx_scale(scale, torch.uint8), exponent)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(7),
        torch.tensor(7).expand(1),
        torch.arange(3).expand(2, 3),
        torch.arange(8)[::2],
        torch.arange(6).view(2, 3).T,
        torch.empty(0),
    ],
    ids=["scalar", "one expanded", "expanded", "sliced", "transposed", "empty"],
)
def test_bytes_are_those_of_the_values_in_order(tensor: torch.Tensor) -> None:
    assert raw_bytes(tensor).numpy().tobytes() == tensor.numpy().tobytes()
