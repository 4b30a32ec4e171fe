"""awq: integer codes of 4 bits as AutoAWQ lays them out. The weight is (code - zero) * scale of its group.

Version gemm: `qweight` (I, O / 8) and `qzeros` (G, O / 8), whose words hold 8 outputs in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest
bits on; `scales` (G, O). Version gemv: `qweight` (O, I / 8), `qzeros` (O, W) and `scales` (O, 8 W) in order, where the groups of a row are
filled up to W words.
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
from aerogel.io.dequantize.blocks import dequantize_blocks, shared_by
from aerogel.io.dequantize.checks import FLOATS, Tensors, group_of, group_size, one_of
from aerogel.io.headers import Entry
from aerogel.numerics.packing import unpack

_BITS = 4
_LANES = 32 // _BITS
"""Codes of a word."""
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word, from the lowest bits on, of each of its outputs."""


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder; raises AerogelError on settings that the layout does not have."""
    one_of(config, where, ("bits", "w_bit"), (_BITS,), _BITS)
    one_of(config, where, ("zero_point",), (True,), True)
    one_of(config, where, ("backend",), ("autoawq",), "autoawq")  # llm-awq has a layout of its own
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    version = one_of({"version": version.lower() if isinstance(version, str) else version}, where, ("version",), ("gemm", "gemv"))
    size = group_size(config, where, ("group_size", "q_group_size"))
    return partial(_weights, where, dtype, size, _gemm if version == "gemm" else _gemv)


def dequantize_gemm(qweight: Tensor, qzeros: Tensor, scales_GO: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """Return the weight_OI of version gemm."""
    codes_IO, zero_GO = _in_order(unpack(qweight, _BITS, scales_GO.shape[1])), _in_order(unpack(qzeros, _BITS, scales_GO.shape[1]))
    return dequantize_blocks(codes_IO.T, scales_GO.T, (1, group), dtype, zero_GO.T)


def dequantize_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """Return the weight_OI of version gemv."""
    codes_OI = unpack(qweight, _BITS, qweight.shape[1] * _LANES)
    groups = codes_OI.shape[1] // group
    return dequantize_blocks(codes_OI, scales[:, :groups], (1, group), dtype, unpack(qzeros, _BITS, groups))


def _in_order(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, _LANES))[..., _PLACES].flatten(-2)


def _weights(where: Path, dtype: torch.dtype, size: int, version: Any, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the weights NAME.weight in NAME.qweight, NAME.qzeros and NAME.scales."""
    tensors = Tensors(where, "awq", on_disk.entries)
    found: dict[str, Dequantized | None] = {}
    for values in on_disk.entries:
        name = values.removesuffix(".qweight")
        if name == values:
            continue
        shape, group, make = version(tensors, name, size)
        told = f"awq: int{_BITS} with a scale per {shared_by((1, group), shape)}"
        parts = (f"{name}.qzeros", f"{name}.scales")
        found[f"{name}.weight"] = Dequantized(
            values, parts, Entry.of(dtype, shape), partial(make, group=group, dtype=dtype), (), told, of_linear=True
        )
    tensors.require_some(found, "no tensor is called NAME.qweight")
    return found


def _gemm(tensors: Tensors, name: str, size: int) -> tuple[tuple[int, int], int, Any]:
    """Return the (outputs, inputs) of a weight, the size of its groups and what dequantizes it."""
    values, zeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    inputs, words = tensors.matrix(values, values, (torch.int32,))
    group, groups = _groups(tensors, values, inputs, size)
    tensors.expect(zeros, values, (torch.int32,), (groups, words))
    tensors.expect(scales, values, FLOATS, (groups, words * _LANES))
    return (words * _LANES, inputs), group, dequantize_gemm


def _gemv(tensors: Tensors, name: str, size: int) -> tuple[tuple[int, int], int, Any]:
    """Return the same for the other version."""
    values, zeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    outputs, words = tensors.matrix(values, values, (torch.int32,))
    inputs = words * _LANES
    group, groups = _groups(tensors, values, inputs, size)
    least = math.ceil(groups / _LANES)
    filled = math.ceil(least / _multiple(group)) * _multiple(group)
    tensors.expect(zeros, values, (torch.int32,), (outputs, filled))
    tensors.expect(scales, values, FLOATS, (outputs, filled * _LANES))
    return (outputs, inputs), group, dequantize_gemv


def _groups(tensors: Tensors, values: str, inputs: int, size: int) -> tuple[int, int]:
    """Return the size of the groups of a row and their number; raises AerogelError where they are not whole."""
    groups = 1 if size == -1 else inputs // size
    group = group_of((size,), inputs, groups)
    if group is None:
        raise AerogelError(f"{tensors.where}: group_size is {size}, which does not divide the {inputs} inputs of {values}; fetch it again")
    return group, groups


def _multiple(group: int) -> int:
    """Words of zero points come in multiples of this: kernels read as many at once."""
    return max(1, 128 // group)
