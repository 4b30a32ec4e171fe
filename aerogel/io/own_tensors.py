"""Tensors that folders of this package store otherwise than modules have them: bit masks, and the empty weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aerogel.io import bitmask, empty_weight
from aerogel.io.checkpoint import Dequantize, together
from aerogel.io.quantized import quantization_of


def reader(settings: dict[str, Any], folder: Path) -> Dequantize | None:
    """Return what reads them in a folder with this config.json; None where it names none."""
    quantization, where = quantization_of(settings), folder / "config.json"
    return together(bitmask.reader(quantization, where), empty_weight.reader(quantization, where))
