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
from aerogel.numerics.packing import pack, pack_e8m0, pack_fp4, raw_bytes, unpack, unpack_e8m0, unpack_fp4
from aerogel.numerics.quantize import to_codes, to_values


@given(
    bits=st.integers(2, 8), rows=st.integers(1, 40), columns=st.integers(1, 40), packed_dim=st.sampled_from((0, 1)), seed=st.integers(0, 99)
)
def test_words_match_compressed_tensors(bits: int, rows: int, columns: int, packed_dim: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits, packed_dim)
    assert words.is_contiguous()
    assert torch.equal(words, pack_to_int32(codes, bits, packed_dim))
    assert torch.equal(unpack(words, bits, codes.shape[packed_dim], packed_dim), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape, packed_dim), codes)


def test_experts_pack_one_by_one() -> None:
    codes = torch.randint(-8, 8, (3, 4, 20), dtype=torch.int8)
    assert torch.equal(pack(codes, 4), torch.stack([pack(expert, 4) for expert in codes]))
    assert torch.equal(unpack(pack(codes, 4, 0), 4, 4, 0), codes)


def test_three_bits_leave_two_bits_of_a_word_empty() -> None:
    words = pack(torch.full((1, 10), 3, dtype=torch.int8), 3)
    assert words.tolist() == [[2**30 - 1]]


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
