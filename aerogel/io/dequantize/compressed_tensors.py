"""compressed-tensors: integer and float weights of one linear layer at a time, as llm-compressor writes them.

A layer has the layout that its tensors say: `weight_packed` in int32 (pack-quantized) or in bytes (fp4), or `weight` in int8 or float8
(int-, float- and naive-quantized). Its scheme is that of its group in the quantization_config.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.dequantize.blocks import dequantize_blocks, shared_by
from aerogel.io.dequantize.checks import FLOATS, Tensors
from aerogel.io.headers import Entry
from aerogel.io.packed_words import padded
from aerogel.io.quantized import assignments
from aerogel.numerics.formats import Format
from aerogel.numerics.packing import unpack, unpack_fp4, unpack_padded, words_of
from aerogel.numerics.quantize import to_values
from aerogel.numerics.scheme import PerBlock, PerChannel, PerGroup, PerTensor, TensorScheme

_METHOD = "compressed-tensors"
_AGAIN = "get the files of one model"
# Beside a weight, and beside what is in an attention.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_OF_ATTENTION = ("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point")
_ZEROS = (torch.int8, torch.float8_e4m3fn, *FLOATS)


@dataclass(frozen=True)
class Layout:
    """Layout of one weight."""

    name: str
    """Name of its layer."""
    format: Format
    shape: tuple[int, int]
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    padded: bool
    """True for words of before compressed-tensors 0.18."""
    parts: tuple[str, ...]
    """Names of the tensors beside the values, without that of the layer."""


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder."""
    return partial(_weights, where, dtype, config)


def dequantize_layer(values: Tensor, *parts: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight_OI; raises AerogelError on a group that does not exist."""
    beside = dict(zip(layout.parts, parts, strict=True))
    rows, columns = layout.shape
    scale, zero, order = beside["weight_scale"], beside.get("weight_zero_point"), beside.get("weight_g_idx")
    codes, table, bits = values, None, layout.format.bits
    unpacked = unpack_padded if layout.padded else unpack
    if values.dtype == torch.int32:
        codes = unpacked(values, bits, columns)
    elif layout.format.levels is not None:
        codes, table = unpack_fp4(values), to_values(torch.arange(2 * len(layout.format.levels)), layout.format)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpacked(zero, bits, rows, packed_dim=0)
    if (outer := beside.get("weight_global_scale")) is not None:
        scale = scale.float() / outer.float()
    if order is not None:
        order = _checked(order, layout, scale.shape[-1])
    return dequantize_blocks(codes, scale, layout.block, dtype, zero, order, table)


def _checked(order: Tensor, layout: Layout, groups: int) -> Tensor | None:
    """Return the group of each input; None where there is a place for it that nothing was written to."""
    low, high = int(order.min()), int(order.max())
    if low == high == -1:
        return None
    if not 0 <= low <= high < groups:
        raise AerogelError(f"{layout.name}.weight_g_idx names the groups {low} to {high}, and there are {groups}; {_AGAIN}")
    return order.long()


def _weights(where: Path, dtype: torch.dtype, config: Mapping[str, Any], on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the weights that have a scale, and the scales of activations."""
    tensors = Tensors(where, _METHOD, on_disk.entries)
    homes = [name.removesuffix(".weight_scale") for name in on_disk.entries if name.endswith(".weight_scale")]
    schemes = _schemes(config, homes)
    unread = {f"{home}.{kind}" for home in homes for kind in _OF_ACTIVATIONS}
    unread |= {f"{home.rpartition('.')[0]}.{kind}" for home in homes for kind in _OF_ATTENTION}
    found: dict[str, Dequantized | None] = {}
    for home in homes:
        if home not in schemes:
            raise AerogelError(f"{where} says of no group of {_METHOD} how {home} is quantized, and {home}.weight_scale is there; {_AGAIN}")
        packed = f"{home}.weight_packed"
        values = packed if packed in on_disk.entries else f"{home}.weight"
        layout = _layout(tensors, on_disk, values, schemes[home], padded(config))
        shared = f"{layout.format} with a scale per {shared_by(layout.block, layout.shape)}"
        found[f"{home}.weight"] = Dequantized(
            values,
            tuple(f"{home}.{part}" for part in layout.parts),
            Entry.of(dtype, layout.shape),
            partial(dequantize_layer, layout=layout, dtype=dtype),
            (),
            f"{_METHOD}: {shared}",
            tuple({f"{home}.weight_shape"} & on_disk.entries.keys()),
            of_linear=True,
        )
    return found | dict.fromkeys(unread & on_disk.entries.keys())


def _schemes(config: Mapping[str, Any], homes: list[str]) -> dict[str, TensorScheme]:
    """Return how the weights of layers are quantized; how inputs and outputs are does not matter here.

    Where there is one scheme, it is that of all: names on disk may be others than those that the config is about.
    """
    groups = {
        name: {"targets": group["targets"], "weights": group["weights"]}
        for name, group in config["config_groups"].items()
        if group.get("weights")
    }
    if len({json.dumps(group["weights"], sort_keys=True) for group in groups.values()}) == 1:
        groups = {name: {**group, "targets": ["Linear"]} for name, group in groups.items()}
        config = {}
    of_weights = {"quant_method": _METHOD, "config_groups": groups, "ignore": config.get("ignore")}
    return {name: assigned.scheme.weights for name, assigned in assignments(of_weights, homes).items()}


def _layout(tensors: Tensors, on_disk: OnDisk, values: str, scheme: TensorScheme, padded: bool) -> Layout:
    """Read the layout of a weight off its tensors; raises AerogelError where they do not fit together, or its scheme."""
    home, entries = values.rpartition(".")[0], on_disk.entries
    shape = _shape(tensors, on_disk, values, scheme.format, padded)
    block = _block(scheme, shape)
    if block is None:
        raise AerogelError(f"{tensors.where}: {home} has weights with a scale for each {_unread(scheme)}, which is not read; {_AGAIN}")
    grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    one = [(1,), ()] if grid == (1, 1) else [(shape[0],)] if grid == (shape[0], 1) else []
    tensors.expect(f"{home}.weight_scale", values, _scales(scheme), grid, *one)
    parts, zero = ["weight_scale"], f"{home}.weight_zero_point"
    if zero in entries and entries[zero].dtype == torch.int32:
        tensors.expect(zero, values, (torch.int32,), (_words(shape[0], scheme.format.bits, padded), grid[1]))
        parts.append("weight_zero_point")
    elif zero in entries or not scheme.symmetric:
        tensors.expect(zero, values, _ZEROS, grid, *one)
        parts.append("weight_zero_point")
    if scheme.scale_format == "e4m3":
        tensors.expect(f"{home}.weight_global_scale", values, FLOATS, (1,), ())
        parts.append("weight_global_scale")
    if f"{home}.weight_g_idx" in entries:
        tensors.expect(f"{home}.weight_g_idx", values, (torch.int32, torch.int64), (shape[1],))
        parts.append("weight_g_idx")
    return Layout(home, scheme.format, shape, block, padded, tuple(parts))


def _shape(tensors: Tensors, on_disk: OnDisk, values: str, fmt: Format, padded: bool) -> tuple[int, int]:
    """Return (outputs, inputs) of a weight."""
    if not values.endswith("_packed"):
        return tensors.matrix(values, values, (fmt.storage,))
    if fmt.levels is not None:
        rows, columns = tensors.matrix(values, values, (torch.uint8,))
        return rows, 2 * columns
    rows, words = tensors.matrix(values, values, (torch.int32,))
    told = f"{values.removesuffix('_packed')}_shape"
    tensors.expect(told, values, (torch.int64, torch.int32), (2,))
    shape = on_disk.read(told).tolist()
    if shape[0] != rows or shape[1] < 1 or _words(shape[1], fmt.bits, padded) != words:
        raise AerogelError(
            f"{tensors.where.parent}: {told} says {shape}, and {values} is {[rows, words]}, which is no such weight of {fmt.bits} bits; "
            f"{_AGAIN}"
        )
    return rows, shape[1]


def _unread(scheme: TensorScheme) -> str:
    return type(scheme.granularity).__name__.removeprefix("Per").lower()


def _scales(scheme: TensorScheme) -> tuple[torch.dtype, ...]:
    """Return the dtypes that scales have; bytes are exponents."""
    exponents = (torch.uint8, torch.float8_e8m0fnu)
    if scheme.scale_format != "float":
        return (torch.float8_e4m3fn,) if scheme.scale_format == "e4m3" else exponents
    return (*FLOATS, *exponents) if scheme.format.kind == "float" else FLOATS


def _words(count: int, bits: int, padded: bool) -> int:
    return math.ceil(count / (32 // bits)) if padded else words_of(count, bits)


def _block(scheme: TensorScheme, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the rows and columns of a weight that share a scale."""
    match scheme.granularity:
        case PerTensor():
            return shape
        case PerChannel():
            return 1, shape[1]
        case PerGroup(size):
            return 1, size
        case PerBlock(rows, columns):
            return rows, columns
        case _:
            return None
