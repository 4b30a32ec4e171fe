"""What the master format refuses, so that a plan can say it before any work."""

from __future__ import annotations

import pytest

from aerogel.layers.layout import format_of, refuse
from aerogel.numerics.scheme import Scheme


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W4A16", "pack-quantized"),
        ("W3A16_CHANNEL", "pack-quantized"),
        ("W8A8", "int-quantized"),
        ("W4A8_G32", "pack-quantized"),
        ("FP8_DYNAMIC", "float-quantized"),
        ("NVFP4A16", "nvfp4-pack-quantized"),
        ("MXFP4A16", "mxfp4-pack-quantized"),
    ],
)
def test_each_scheme_has_its_format(name: str, expected: str) -> None:
    assert format_of(Scheme.parse(name)) == expected


@pytest.mark.parametrize(("name", "inputs", "outputs"), [("W4A16_G64", 576, 100), ("W4A16_CHANNEL", 577, 3), ("FP8_BLOCK", 256, 384)])
def test_what_fits_is_not_refused(name: str, inputs: int, outputs: int) -> None:
    assert refuse(Scheme.parse(name), inputs, outputs) is None


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "word"),
    [
        ("W4A16", 576, 64, "576 inputs do not divide into groups of 128"),
        ("W4A16", 64, 64, "groups of 128"),
        ("FP8_BLOCK", 256, 200, "128x128 blocks"),
        ("FP8_BLOCK", 128, 256, "at least two across"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name: str, inputs: int, outputs: int, word: str) -> None:
    reason = refuse(Scheme.parse(name), inputs, outputs)
    assert reason is not None
    assert word in reason
