"""Masks and values give the same tensor back, bit for bit, and do not take each other's place."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.numerics.bitmask import Masked, bytes_of, compress, count, decompress
from aerogel.numerics.packing import raw_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)


def sparse(shape: tuple[int, ...], dtype: torch.dtype, share: float, seed: int) -> Tensor:
    """Random bits, NaN and -0.0 among them, of which a share is zero."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    raw[torch.rand(shape, generator=generator) < share] = 0
    return raw.view(dtype).squeeze(-1)


@given(
    rows=st.integers(0, 9),
    inputs=st.integers(1, 40),
    leading=st.lists(st.integers(1, 3), max_size=1),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from((0.0, 0.5, 0.9, 1.0)),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(rows: int, inputs: int, leading: list[int], dtype: torch.dtype, share: float, seed: int) -> None:
    dense = sparse((*leading, rows, inputs), dtype, share, seed)
    masked = compress(dense)
    assert masked.mask.shape == (*leading, rows, bytes_of(inputs))
    assert count(masked.mask, inputs) == len(masked.values)
    again = decompress(masked, inputs)
    assert again.dtype == dtype
    assert again.shape == dense.shape
    if dense.numel():
        assert torch.equal(raw_bytes(again), raw_bytes(dense))


@given(rows=st.integers(1, 9), inputs=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_first_input_is_the_lowest_bit(rows: int, inputs: int, seed: int) -> None:
    dense = sparse((rows, inputs), torch.float32, 0.5, seed)
    kept = raw_bytes(dense).view(rows, inputs, 4).any(-1).numpy()
    assert numpy.array_equal(compress(dense).mask.numpy(), numpy.packbits(kept, axis=-1, bitorder="little"))


def test_negative_zero_is_a_value() -> None:
    masked = compress(torch.tensor([[0.0, -0.0, 1.0]]))
    assert masked.values.tolist() == [0.0, 1.0]
    assert decompress(masked, 3).signbit().tolist() == [[False, True, False]]


def test_a_transposed_tensor_is_taken_in_the_order_of_its_rows() -> None:
    dense = sparse((6, 4), torch.bfloat16, 0.5, 0)
    assert torch.equal(raw_bytes(decompress(compress(dense.T), 6)), raw_bytes(dense.T.contiguous()))


@given(inputs=st.integers(1, 20), bit=st.integers(0, 19), seed=st.integers(0, 99))
def test_a_flipped_bit_is_an_error(inputs: int, bit: int, seed: int) -> None:
    masked = compress(sparse((2, inputs), torch.float16, 0.5, seed))
    flipped = masked.mask.clone()
    flipped[1, bit // 8 % flipped.shape[1]] ^= 1 << bit % 8
    with pytest.raises(AerogelError, match="its mask has"):
        decompress(Masked(flipped, masked.values), inputs)
    with pytest.raises(AerogelError, match="its mask has"):
        decompress(Masked(masked.mask, masked.values.new_ones(len(masked.values) + 1)), inputs)
