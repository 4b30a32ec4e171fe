"""mxfp4: experts as `NAME_blocks`, fp4 values two in a byte, and `NAME_scales`, the exponents of their groups (GPT-OSS)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.headers import Entry
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.packing import unpack_e8m0, unpack_fp4


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder."""
    return partial(_weights, where, dtype)


def dequantize_mxfp4(blocks_OGB: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (I, O) of fp4 values, two in a byte, and the exponents of their groups."""
    levels = FORMATS["fp4_e2m1"].levels
    assert levels is not None
    values = torch.tensor([*levels, *(-level for level in levels)], device=blocks_OGB.device)
    groups = values[unpack_fp4(blocks_OGB).int()] * unpack_e8m0(scales_OG).unsqueeze(-1)
    return groups.flatten(-2).to(dtype).transpose(-1, -2)


def _weights(where: Path, dtype: torch.dtype, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the weights NAME, (experts, inputs, outputs), in NAME_blocks and NAME_scales, whose outputs come first."""
    found: dict[str, Dequantized | None] = {}
    entries = on_disk.entries
    for values, entry in entries.items():
        name = values.removesuffix("_blocks")
        if name == values or entry.dtype != torch.uint8:
            continue
        scale = f"{name}_scales"
        if scale not in entries:
            raise AerogelError(f"{where} says mxfp4, and {values} has no scales (expected {scale}); get all files of the model again")
        shape = entries[scale].shape
        if entry.shape[:-1] != shape or len(shape) < 2 or entries[scale].dtype != torch.uint8:
            raise AerogelError(
                f"{where.parent}: {scale} is {list(shape)} of {entries[scale].dtype}, expected {list(entry.shape[:-1])} of torch.uint8 "
                f"for {values} {list(entry.shape)}; get the files of one model"
            )
        *leading, outputs, groups, packed = entry.shape
        made = Entry.of(dtype, (*leading, groups * packed * 2, outputs))
        make, size = partial(dequantize_mxfp4, dtype=dtype), 2 * packed
        found[name] = Dequantized(values, (scale,), made, make, (scale,), f"mxfp4: fp4_e2m1 with a scale per group of {size}")
    return found
