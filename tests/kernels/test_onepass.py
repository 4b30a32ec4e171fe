"""The compiled quantization of large inputs gives the codes of numerics, and its absence changes nothing but the time."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from aerogel.kernels import affine, onepass
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import Grid, quantize
from aerogel.numerics.scheme import PerTensor, TensorScheme

INT8 = format_named("int8")


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(2, 40, 36, 33)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [None, 17.0])
def test_codes_are_those_of_numerics(dtype: torch.dtype, zero: float | None, images: Tensor) -> None:
    assert images.numel() >= onepass.FEWEST
    assert onepass.works() == (shutil.which("g++") is not None)
    x, grid = images.to(dtype), Grid(torch.tensor(0.0213), None if zero is None else torch.tensor(zero))
    wanted = quantize(x, grid, TensorScheme(INT8, PerTensor(), symmetric=zero is None))
    codes = affine.codes(x, grid, INT8)
    assert torch.equal(codes, wanted)
    assert codes.stride() == x.stride()
    assert {int(codes.min()), int(codes.max())} == {INT8.low, INT8.high}, "both ends are reached"


def test_without_a_compiler_the_passes_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    grid = Grid(torch.tensor(0.02), torch.tensor(-4.0))
    wanted = affine.codes(images, grid, INT8)

    def missing(*given: object) -> Tensor:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(onepass, "compiled", lambda chain: missing)
    onepass.works.cache_clear()
    try:
        assert not onepass.works()
        assert torch.equal(affine.codes(images, grid, INT8), wanted)
    finally:
        onepass.works.cache_clear()


def test_code_that_counts_differently_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onepass, "compiled", lambda chain: lambda *given: chain(*given) + 1)
    onepass.works.cache_clear()
    try:
        assert not onepass.works()
    finally:
        onepass.works.cache_clear()
