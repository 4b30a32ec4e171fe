"""Schemes: what each name and mapping means, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.numerics.formats import FORMATS, format_named
from aerogel.numerics.scheme import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme, TensorScheme


@pytest.mark.parametrize(
    ("name", "bits", "granularity", "symmetric"),
    [
        ("W4A16", 4, PerGroup(128), True),
        ("W4A16_G64", 4, PerGroup(64), True),
        ("w3a16_g64_asym", 3, PerGroup(64), False),
        ("W2A16_CHANNEL", 2, PerChannel(), True),
        ("W8A8", 8, PerChannel(), True),
        ("W4A8_G32", 4, PerGroup(32), True),
    ],
)
def test_integer_names(name: str, bits: int, granularity: object, symmetric: bool) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.bits, scheme.weights.granularity, scheme.weights.symmetric) == (bits, granularity, symmetric)
    assert scheme.group == (granularity.size if isinstance(granularity, PerGroup) else None)
    assert (scheme.inputs is None) == ("16" in name[2:5])
    assert Scheme.parse(scheme) is scheme
    assert Scheme.parse(str(scheme)) == scheme


def test_inputs_are_dynamic_per_token_or_static_per_tensor() -> None:
    int8 = FORMATS["int8"]
    assert Scheme.parse("W8A8").inputs == TensorScheme(int8, PerToken(), dynamic=True)
    assert Scheme.parse("W8A8_STATIC").inputs == TensorScheme(int8, PerTensor())


def test_float_names() -> None:
    assert Scheme.parse("FP8_BLOCK").weights.granularity == PerBlock(128, 128)
    assert Scheme.parse("FP8_DYNAMIC").inputs == TensorScheme(FORMATS["fp8_e4m3"], PerToken(), dynamic=True)
    assert Scheme.parse("NVFP4A16").weights == TensorScheme(FORMATS["fp4_e2m1"], PerGroup(16), scale_format="e4m3")
    assert Scheme.parse("MXFP4A16").weights == TensorScheme(FORMATS["fp4_e2m1"], PerGroup(32), scale_format="e8m0")


def test_mappings_change_a_preset() -> None:
    assert Scheme.parse({"preset": "W4A16", "group": 64, "symmetric": False}) == Scheme.parse("W4A16_G64_ASYM")
    assert Scheme.parse({"preset": "W4A16"}) == Scheme.parse("W4A16")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("W9A16", "unknown scheme 'W9A16'"),
        ("W4A16_G0", "G0"),
        ("W4A16_STATIC", "STATIC"),
        ({"group": 64}, "preset"),
        ({"preset": "W4A16", "bits": 3}, "bits"),
        ({"preset": "W4A16", "group": -64}, "at least 1"),
        ({"preset": "W4A16", "group": "many"}, "whole number"),
        ({"preset": "FP8_DYNAMIC", "symmetric": False}, "symmetric"),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        Scheme.parse(value)


def test_formats_agree_with_torch() -> None:
    for name, dtype in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        assert (FORMATS[name].low, FORMATS[name].high) == (torch.finfo(dtype).min, torch.finfo(dtype).max)
    assert (FORMATS["int8"].low, FORMATS["int8"].high) == (torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max)
    assert [FORMATS[f"int{bits}"].high for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]
    with pytest.raises(AerogelError, match="known: int2"):
        format_named("int9")
