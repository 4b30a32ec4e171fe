"""Pruned weights that lie on disk as a bit mask and the values that are not zero; each is read as the dense tensor that it stands for.

`NAME` is one row of values, in the dtype of the tensor, and `NAME_bitmask` the mask (numerics/bitmask.py). Both follow matrix rows.
Of a convolution a row is all that one output reads. Experts in one tensor have rows of their own, whose values begin at `NAME_offsets`.
Integer codes of a few bits (`weight_packed`) are unpacked first: the mask says which codes are not zero, and these are packed again.
That `NAME` has another shape than the model expects keeps other readers from going on without it.
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
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.dequantize.checks import Tensors
from aerogel.io.headers import Entry
from aerogel.io.quantization_schema import MaskedTensor, masked_tensors
from aerogel.numerics.bitmask import Masked, bytes_of, compress, count, decompress
from aerogel.numerics.packing import pack, pack_fp4, unpack, unpack_fp4, words_of

FORMAT = "bitmask"
"""The `format` of the sparsity_config."""
_EXPERTS = 3
"""Dimensions of experts in one tensor."""
_MASK, _OFFSETS = "_bitmask", "_offsets"
_AGAIN = "get the files of one model"
_WORDS, _FP4 = torch.int32, torch.uint8


def masked(name: str, dense: Tensor, bits: int | None = None, inputs: int | None = None) -> tuple[dict[str, Tensor], MaskedTensor] | None:
    """Return the tensors to store for one of this name, and what config.json says of it; None where they are not smaller.

    With `bits` the tensor holds codes of so many bits, in words of int32 or two in a byte, and a row of them stands for `inputs` inputs.
    """
    if dense.ndim < 2 or name.endswith("bias"):  # those of experts are a matrix, which is read row by row
        return None
    codes = dense if bits is None else _unpacked(dense, bits, inputs or 0)
    rows = codes.reshape(_rows(tuple(codes.shape)))
    mask, values = compress(rows)
    stored = {name: values if bits is None else _packed_values(values, bits, dense.dtype), f"{name}{_MASK}": mask}
    if dense.ndim == _EXPERTS:
        counts = torch.tensor([count(each, rows.shape[-1]) for each in mask], dtype=torch.int64)
        stored[f"{name}{_OFFSETS}"] = counts.cumsum(0) - counts
    if sum(tensor.nbytes for tensor in stored.values()) >= dense.nbytes:
        return None
    return stored, MaskedTensor(shape=list(codes.shape), bits=bits)


def reader(config: Mapping[str, Any], where: Path) -> Dequantize | None:
    """Return what finds the tensors of a folder that are stored so; None where its quantization_config names none."""
    told = masked_tensors(config)
    return partial(_tensors, where, told) if told else None


def _tensors(where: Path, told: Mapping[str, MaskedTensor], on_disk: OnDisk) -> dict[str, Dequantized | None]:
    tensors = Tensors(where, "that weights are stored as bit masks", on_disk.entries)
    return {name: _tensor(tensors, name, one) for name, one in told.items()}


def _tensor(tensors: Tensors, name: str, told: MaskedTensor) -> Dequantized:
    """Return how a tensor is made; raises AerogelError where what it is made of has other shapes than config.json says."""
    shape, mask = tuple(told.shape), f"{name}{_MASK}"
    rows = _rows(shape)
    values = tensors.required(name, mask)
    known = (values.dtype,) if told.bits is None else (_WORDS, _FP4) if told.bits == 4 else (_WORDS,)
    tensors.expect(name, mask, known, (math.prod(values.shape),))
    tensors.expect(mask, name, (torch.uint8,), (*rows[:-1], bytes_of(rows[-1])))
    parts, by_entry = [name], []
    if len(shape) == _EXPERTS:
        by_entry.append(f"{name}{_OFFSETS}")
        tensors.expect(by_entry[0], mask, (torch.int64,), (shape[0],))
    dense = shape if told.bits is None else (shape[0], _width(shape[1], told.bits, values.dtype))
    make = partial(_dense, shape=shape, bits=told.bits, label=f"{tensors.where.parent}: {name}")
    return Dequantized(mask, (*parts, *by_entry), Entry.of(values.dtype, dense), make, tuple(by_entry), "")


def _dense(mask: Tensor, values: Tensor, offsets: Tensor | None = None, *, shape: tuple[int, ...], bits: int | None, label: str) -> Tensor:
    """Return the dense tensor, or one entry of it where the mask is that of one entry."""
    inputs, one = _rows(shape)[-1], offsets is not None and offsets.ndim == 0
    try:
        if offsets is not None:
            values = _of_entries(values, mask, offsets, inputs)
        if bits is None:
            return decompress(Masked(mask, values), inputs).reshape(shape[1:] if one else shape)
        wanted = count(mask, inputs)
        if len(values) != (width := _width(wanted, bits, values.dtype)):
            raise AerogelError(f"its mask has {wanted} bits, whose integer codes take {width} elements, and there are {len(values)}")
        codes = decompress(Masked(mask, _unpacked(values[None], bits, wanted)[0]), inputs)
        return pack(codes, bits) if values.dtype == _WORDS else pack_fp4(codes)
    except AerogelError as error:
        raise AerogelError(f"{label}: {error}; {_AGAIN}") from error


def _of_entries(values: Tensor, mask: Tensor, offsets: Tensor, inputs: int) -> Tensor:
    """Return the values of one entry of a mask, or all of them; raises AerogelError where offsets do not fit the mask."""
    if offsets.ndim == 0:
        start, length = int(offsets), count(mask, inputs)
        if not 0 <= start <= len(values) - length:
            raise AerogelError(f"the {length} values of an entry begin at {start}, and there are {len(values)}")
        return values[start : start + length]
    counts = torch.tensor([count(each, inputs) for each in mask], dtype=torch.int64)
    if not torch.equal(offsets, counts.cumsum(0) - counts):
        raise AerogelError("its values do not begin where its offsets say")
    return values


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape whose last dimension is what a row of the mask covers."""
    kept = 2 if len(shape) == _EXPERTS else 1
    return (*shape[:kept], math.prod(shape[kept:]))


def _width(length: int, bits: int, dtype: torch.dtype) -> int:
    """Return how many words, or bytes of two codes, so many codes take."""
    return words_of(length, bits) if dtype == _WORDS else -(-length // 2)


def _unpacked(packed: Tensor, bits: int, length: int) -> Tensor:
    return unpack(packed, bits, length) if packed.dtype == _WORDS else unpack_fp4(packed)[..., :length]


def _packed_values(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    if dtype == _WORDS:
        return pack(codes[None], bits)[0]
    return pack_fp4(torch.cat([codes, codes.new_zeros(len(codes) % 2)]))
