"""fp8: float8 weights with a scale for each block, channel or tensor (`weight_scale_inv` in DeepSeek, GLM, MiniMax and Qwen3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.dequantize.blocks import dequantize_blocks, shared_by
from aerogel.io.dequantize.checks import Tensors
from aerogel.io.headers import Entry

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Scales of inputs, of outputs and of the KV cache, which weights in 16 bits have no use for.
_OF_ACTIVATIONS = ("input_scale", "input_scale_inv", "activation_scale", "qscale_act", "output_scale", "k_scale", "v_scale")


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder; raises AerogelError on a wrong size of blocks."""
    return partial(_weights, where, _block_of(config, where), dtype)


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


def _weights(where: Path, block: tuple[int, int], dtype: torch.dtype, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the float8 weights with their scales by name, and the scales of activations beside them."""
    found: dict[str, Dequantized | None] = {}
    entries = on_disk.entries
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
        by_entry = (scale,) if len(entry.shape) > 2 and math.prod(shape) > 1 else ()
        told = f"fp8: {str(entry.dtype).removeprefix('torch.')} with a scale per {shared_by(shared, entry.shape)}"
        found[name] = Dequantized(name, (scale,), Entry.of(dtype, entry.shape), make, by_entry, told)
        around = home.rpartition(".")[0]
        unused = {f"{stem}{kind}" for kind in _OF_ACTIVATIONS for stem in (f"{home}.", f"{around}.", f"{name}_")}
        found |= dict.fromkeys(unused & entries.keys())
    Tensors(where, "fp8", entries).require_some(found, "none of the weights is float8")
    return found


def _block_of(config: Mapping[str, Any], where: Path) -> tuple[int, int]:
    """Rows and columns of a block; the usual ones where the config leaves them out."""
    size = config.get("weight_block_size")
    if size is None:
        return 128, 128
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise AerogelError(f"{where}: weight_block_size is {size!r}, expected two positive integers such as [128, 128]; fetch it again")
    return size[0], size[1]
