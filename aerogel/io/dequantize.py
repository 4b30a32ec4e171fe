"""Quantized checkpoints that are opened as float models: fp8 and mxfp4 weights are dequantized one by one as they are read.

Legend: O outputs, I inputs, R x C the grid of scales, G groups of a row, B bytes of a group. Leading dimensions are experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Checkpoint, Dequantize, Dequantized
from aerogel.io.headers import Entry
from aerogel.io.quantized import configs_in, quantization_of
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.packing import unpack_e8m0, unpack_fp4

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Scales of inputs, of outputs and of the KV cache, which weights in 16 bits have no use for.
_OF_ACTIVATIONS = ("input_scale", "input_scale_inv", "activation_scale", "qscale_act", "output_scale", "k_scale", "v_scale")
_ROWS = 1024
"""Rows that are multiplied at a time, so that float32 copies stay small."""


def dequantizer_of(settings: dict[str, Any], folder: Path) -> Dequantize | None:
    """Return what turns a folder's quantized tensors into floats; None where its config.json names no such format.

    Raises AerogelError, like what it returns, on a config or tensors that do not fit together.
    """
    config, where = quantization_of(settings), folder / "config.json"
    if config.get("quant_method") == "fp8":
        return partial(_fp8, where, _block_of(config, where), _dtype_of(settings))
    if config.get("quant_method") == "mxfp4":
        return partial(_mxfp4, where, _dtype_of(settings))
    return None


def told(checkpoint: Checkpoint) -> str | None:
    """Return a line that says how weights were quantized on disk and what became of them; None where none was."""
    made = checkpoint.dequantized()
    if not made:
        return None
    formats = ", ".join(sorted({one.format for one in made.values()}))
    dtype = str(next(iter(made.values())).entry.dtype).removeprefix("torch.")
    unread = " and its scales of activations are not used" if checkpoint.unread() else ""
    return f"the source is quantized ({formats}); its weights are dequantized to {dtype}{unread}"


def dequantize_blocks(weight_OI: Tensor, scale_RC: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return weight * scale of its block, in float32 and then rounded to `dtype`; the last blocks may be smaller than `block`.

    Leading dimensions of the weight are kept; a single scale grid is for all of them.
    """
    rows, columns = weight_OI.shape[-2:]
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    matrices = weight_OI.reshape(-1, rows, columns)
    scales = _numbers(scale_RC).reshape(-1, *grid).expand(len(matrices), *grid)
    found = torch.empty(matrices.shape, dtype=dtype, device=weight_OI.device)
    for matrix, scale, out in zip(matrices, scales, found, strict=True):
        for start in range(0, rows, _ROWS):
            part = matrix[start : start + _ROWS].float()
            of_rows = scale[torch.arange(start, start + len(part), device=scale.device) // block[0]]
            part *= of_rows.repeat_interleave(block[1], dim=1)[:, :columns] if grid[1] > 1 else of_rows
            out[start : start + _ROWS] = part
    return found.reshape(weight_OI.shape)


def dequantize_mxfp4(blocks_OGB: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (I, O) of fp4 values, two in a byte, and the exponents of their groups."""
    levels = FORMATS["fp4_e2m1"].levels
    assert levels is not None
    values = torch.tensor([*levels, *(-level for level in levels)], device=blocks_OGB.device)
    groups = values[unpack_fp4(blocks_OGB).int()] * unpack_e8m0(scales_OG).unsqueeze(-1)
    return groups.flatten(-2).to(dtype).transpose(-1, -2)


def block_of(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (rows, columns) of a weight that share a scale: blocks, a row, or all; None where the shapes do not fit together."""
    if len(weight) < 2:
        return None
    *leading, rows, columns = weight
    if math.prod(scale) == 1:
        return rows, columns
    of_one = scale[len(leading) :]
    if scale[: len(leading)] != tuple(leading):
        return None
    if of_one == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        return block
    if of_one in ((rows,), (rows, 1)):
        return 1, columns
    return (rows, columns) if of_one in ((), (1,), (1, 1)) else None


def _numbers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents."""
    return unpack_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()


def _fp8(where: Path, block: tuple[int, int], dtype: torch.dtype, entries: Mapping[str, Entry]) -> dict[str, Dequantized | None]:
    """Find the float8 weights with their scales by name, and the scales of activations beside them."""
    found: dict[str, Dequantized | None] = {}
    for name, entry in entries.items():
        if entry.dtype not in _FLOAT8:
            continue
        home = name.rpartition(".")[0]
        kinds = (f"{name}_scale_inv", f"{name}_scale", f"{home}.scale", f"{home}.qscale_weight")
        scale = next((kind for kind in kinds if kind in entries), None)
        if scale is None:
            raise AerogelError(
                f"{where} says fp8, and {name} is {entry.dtype} without a scale (expected {kinds[0]}); get all files of the model again"
            )
        shape = entries[scale].shape
        shared = block_of(entry.shape, shape, block)
        if shared is None:
            raise AerogelError(
                f"{where.parent}: {scale} is {list(shape)}, which does not fit {name} {list(entry.shape)} in blocks of "
                f"{block[0]} x {block[1]} (weight_block_size), per channel or per tensor; get the files of one model"
            )
        make = partial(dequantize_blocks, block=shared, dtype=dtype)
        leading = len(entry.shape) > 2 and math.prod(shape) > 1
        found[name] = Dequantized(name, scale, Entry.of(dtype, entry.shape), make, leading, _named(entry, shared))
        around = home.rpartition(".")[0]
        unused = {f"{stem}{kind}" for kind in _OF_ACTIVATIONS for stem in (f"{home}.", f"{around}.", f"{name}_")}
        found |= dict.fromkeys(unused & entries.keys())
    return found


def _named(entry: Entry, shared: tuple[int, int]) -> str:
    rows, columns = entry.shape[-2:]
    each = "tensor" if shared == (rows, columns) else "channel" if shared == (1, columns) else f"block of {shared[0]} x {shared[1]}"
    return f"fp8: {str(entry.dtype).removeprefix('torch.')} with a scale per {each}"


def _mxfp4(where: Path, dtype: torch.dtype, entries: Mapping[str, Entry]) -> dict[str, Dequantized | None]:
    """Find the weights NAME, (experts, inputs, outputs), in NAME_blocks and NAME_scales, whose outputs come first."""
    found: dict[str, Dequantized | None] = {}
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
        found[name] = Dequantized(values, scale, made, make, True, f"mxfp4: fp4_e2m1 with a scale per group of {size}")
    return found


def _block_of(config: Mapping[str, Any], where: Path) -> tuple[int, int]:
    """Rows and columns of a block; the usual ones where the config leaves them out."""
    size = config.get("weight_block_size")
    if size is None:
        return 128, 128
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise AerogelError(f"{where}: weight_block_size is {size!r}, expected two positive integers such as [128, 128]; fetch it again")
    return size[0], size[1]


def _dtype_of(settings: dict[str, Any]) -> torch.dtype:
    """The float dtype that the config names for the model, or for the language model in it; else bfloat16."""
    for part in configs_in(settings):
        for key in ("dtype", "torch_dtype"):
            if (named := str(part.get(key)).removeprefix("torch.")) in _FLOATS:
                return _FLOATS[named]
    return torch.bfloat16
