"""bitsandbytes: nf4 and fp4 weights with a scale for each block of a flat weight, and int8 weights with a scale for each row.

4 bits: `NAME.weight` holds two codes a byte, the first in the high half; `.absmax` the scales, `.quant_map` the 16 values of a code.
Nested scales are codes too: `.nested_quant_map` has their 256 values, `.nested_absmax` a scale for each of their blocks.
`.quant_state.bitsandbytes__nf4` holds JSON: the shape, the sizes of blocks, and what is added to nested scales.
8 bits: the weight is `NAME.weight` * `NAME.SCB` / 127.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.dequantize.blocks import dequantize_blocks
from aerogel.io.dequantize.checks import FLOATS, Tensors
from aerogel.io.headers import Entry
from aerogel.io.json_files import parse_object

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_AGAIN = "get the files of one model"
_AT_ONCE = 1 << 20
"""Numbers that are multiplied at a time, so that float32 copies stay small."""
_ROW_MAJOR = 0
"""The weight_format of weights that lie row by row; others are laid out for one kind of GPU."""


@dataclass(frozen=True)
class State:
    """Quantization of one weight of 4 bits."""

    shape: tuple[int, int]
    block: int
    nested_block: int = 0
    """Scales that share a scale; 0 where scales are floats."""
    offset: float = 0.0
    """Number that was subtracted from the scales before they were quantized."""


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder."""
    return partial(_weights, where, dtype)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    *,
    state: State,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of this shape, part by part in float32 and then rounded to `dtype`."""
    scale = absmax.flatten()
    if nested_absmax is not None and nested_quant_map is not None:
        outer = nested_absmax.float().repeat_interleave(state.nested_block)[: len(scale)]
        scale = nested_quant_map.float()[scale.int()] * outer + state.offset
    values, packed, scale = quant_map.float(), packed.contiguous().view(torch.uint8).flatten(), scale.float()
    found = torch.empty(math.prod(state.shape), dtype=dtype, device=packed.device)
    whole = max(1, _AT_ONCE // state.block)
    for first in range(0, len(scale), whole):
        start, of_blocks = first * state.block, scale[first : first + whole]
        part = found[start : start + whole * state.block]
        bytes_ = packed[start // 2 : start // 2 + -(-len(part) // 2)]
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=-1).flatten()[: len(part)]
        part.copy_(values[codes.int()] * of_blocks.repeat_interleave(state.block)[: len(part)])
    return found.reshape(state.shape)


def dequantize_int8(weight_OI: Tensor, scale_O: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return weight * scale / 127, where the scale of a row is its largest magnitude."""
    return dequantize_blocks(weight_OI, scale_O.float().unsqueeze(1) / 127, (1, weight_OI.shape[1]), dtype)


def _weights(where: Path, dtype: torch.dtype, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the weights of either kind by the tensors beside them."""
    tensors = Tensors(where, "bitsandbytes", on_disk.entries)
    found: dict[str, Dequantized | None] = {}
    for name, entry in on_disk.entries.items():
        if _STATE in name:
            weight, kind = name.split(_STATE)
            found[weight] = _of_4bit(tensors, weight, kind, _state(tensors, on_disk, name, kind), dtype)
        elif entry.dtype == torch.int8 and name.endswith(".weight"):
            found[name] = _of_8bit(tensors, on_disk, name, dtype)
    for name, entry in on_disk.entries.items():
        if entry.dtype == torch.uint8 and name.endswith(".weight") and name not in found:
            raise AerogelError(
                f"{where} says bitsandbytes, and {name} is {entry.dtype} without {name}{_STATE}nf4 or fp4; get all files of the model again"
            )
    tensors.require_some(found, "no weight has 4 or 8 bits")
    return found


def _state(tensors: Tensors, on_disk: OnDisk, name: str, kind: str) -> State:
    """Read the JSON of a weight; raises AerogelError where it is not what bitsandbytes writes."""
    entry, source = on_disk.entries[name], f"{tensors.where.parent}: {name}"
    if entry.dtype != torch.uint8 or len(entry.shape) != 1 or not 0 < entry.bytes < 1 << 16:
        raise AerogelError(f"{source} is {list(entry.shape)} of {entry.dtype}, expected JSON in bytes (torch.uint8); {_AGAIN}")
    read = parse_object(bytes(on_disk.read(name).tolist()), source, _AGAIN)
    shape, block, nested, offset = read.get("shape"), read.get("blocksize"), read.get("nested_blocksize", 0), read.get("nested_offset", 0.0)
    if kind not in _KINDS or read.get("quant_type") != kind:
        raise AerogelError(f"{source} says quant_type={read.get('quant_type')!r}, expected {' or '.join(_KINDS)} as in its name; {_AGAIN}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_is_size(side) for side in shape)):
        raise AerogelError(f"{source} says shape={shape!r:.80}, expected two positive integers; {_AGAIN}")
    if not _is_size(block) or block % 2 or not (nested == 0 or _is_size(nested)):
        raise AerogelError(f"{source} says blocksize={block!r:.80} and nested_blocksize={nested!r:.80}, expected even sizes; {_AGAIN}")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise AerogelError(f"{source} says nested_offset={offset!r:.80}, expected a number; {_AGAIN}")
    return State((shape[0], shape[1]), block, nested, float(offset))


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**31


def _of_4bit(tensors: Tensors, name: str, kind: str, state: State, dtype: torch.dtype) -> Dequantized:
    """Return a weight whose tensors fit its state."""
    count = math.prod(state.shape)
    scales = math.ceil(count / state.block)
    entry = tensors.required(name, name)
    if entry.bytes != math.ceil(count / 2):
        raise AerogelError(
            f"{tensors.where.parent}: {name} has {entry.bytes} bytes, expected {math.ceil(count / 2)} for {list(state.shape)} in 4 bits; "
            f"{_AGAIN}"
        )
    nested = state.nested_block > 0
    tensors.expect(f"{name}.absmax", name, (torch.uint8,) if nested else FLOATS, (scales,), (scales, 1))
    tensors.expect(f"{name}.quant_map", name, (torch.float32,), (16,))
    parts = [f"{name}.absmax", f"{name}.quant_map"]
    if nested:
        tensors.expect(f"{name}.nested_absmax", name, (torch.float32,), (math.ceil(scales / state.nested_block),))
        tensors.expect(f"{name}.nested_quant_map", name, (torch.float32,), (256,))
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    told = f"bitsandbytes: {kind} with a scale per block of {state.block}{', scales in int8' if nested else ''}"
    make = partial(dequantize_4bit, state=state, dtype=dtype)
    return Dequantized(name, tuple(parts), Entry.of(dtype, state.shape), make, (), told, (f"{name}{_STATE}{kind}",), of_linear=True)


def _of_8bit(tensors: Tensors, on_disk: OnDisk, name: str, dtype: torch.dtype) -> Dequantized:
    """Return a weight with a scale for each row."""
    home = name.removesuffix(".weight")
    shape = tensors.matrix(name, name, (torch.int8,))
    tensors.expect(f"{home}.SCB", name, (torch.float32,), (shape[0],))
    layout = f"{home}.weight_format"
    if layout in on_disk.entries:
        tensors.expect(layout, name, (torch.uint8, torch.int32, torch.int64), (), (1,))
        if (number := int(on_disk.read(layout))) != _ROW_MAJOR:
            raise AerogelError(f"{tensors.where.parent}: {layout} is {number}, expected {_ROW_MAJOR} (row by row); save the model again")
    make = partial(dequantize_int8, dtype=dtype)
    descriptions = tuple({layout} & on_disk.entries.keys())
    told = "bitsandbytes: int8 with a scale per channel"
    return Dequantized(name, (f"{home}.SCB",), Entry.of(dtype, shape), make, (), told, descriptions, of_linear=True)
