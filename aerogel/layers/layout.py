"""Layout of one quantized linear layer on disk: the tensors of the compressed-tensors formats, from integer codes and grid and back.

Letters in names: O outputs, I inputs, G groups of a row. All functions are pure; names of tensors are relative to the linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.numerics.packing import pack, pack_e8m0, pack_fp4, unpack, unpack_e8m0, unpack_fp4, words_of
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerStep, PerTensor, Scheme


class Stored(NamedTuple):
    """Content of the tensors of one linear layer."""

    codes: Tensor
    grid: Grid
    g_idx: Tensor | None
    input_grid: Grid | None


def format_of(scheme: Scheme) -> str:
    """Name of the compressed-tensors format that a scheme is stored in."""
    weights = scheme.weights
    if weights.format.levels is not None:
        return "mxfp4-pack-quantized" if weights.scale_format == "e8m0" else "nvfp4-pack-quantized"
    if weights.format.kind == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.inputs is None or scheme.bits < 8 else "int-quantized"


def refuse(scheme: Scheme, in_features: int, out_features: int) -> str | None:
    """Return why compressed-tensors cannot hold a linear of this shape in this scheme, or None when it can."""
    weights = scheme.weights
    if weights.format.name == "fp8_e5m2":
        return "compressed-tensors knows fp8 weights in e4m3 only; use FP8_DYNAMIC or FP8_STATIC"
    match weights.granularity:
        case PerGroup(size) if in_features % size:
            return f"{in_features} inputs do not divide into groups of {size}; use a group size that divides them, or a CHANNEL scheme"
        case PerBlock(rows, columns) if out_features % rows or in_features % columns or (in_features == columns and out_features > rows):
            return f"a weight of {out_features}x{in_features} has no whole {rows}x{columns} blocks, at least two across; use FP8_DYNAMIC"
        case PerTensor() if not weights.symmetric and format_of(scheme) == "pack-quantized":
            return "packed weights with one zero point for the whole tensor are not in compressed-tensors; use a CHANNEL scheme"
        case PerTensor() | PerChannel() | PerGroup() | PerBlock():
            return None
        case other:
            return f"a weight cannot have the granularity {type(other).__name__}"


def encode(stored: Stored, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors to store; scales go to `dtype`, which loses nothing when the grid is a stored grid."""
    codes, grid, g_idx, input_grid = stored
    scale = _at_least_1d(grid.scale)
    layout = format_of(scheme)
    if layout == "pack-quantized":
        tensors = {"weight_packed": pack(codes, scheme.bits), "weight_scale": scale.to(dtype)}
        tensors["weight_shape"] = torch.tensor(codes.shape, device=codes.device)
        if grid.zero is not None:
            tensors["weight_zero_point"] = pack(grid.zero, scheme.bits, packed_dim=0)
    elif layout.endswith("fp4-pack-quantized"):
        tensors = {"weight_packed": pack_fp4(codes)}
        tensors["weight_scale"] = pack_e8m0(scale) if grid.outer is None else scale.to(torch.float8_e4m3fn)
        if grid.outer is not None:
            tensors["weight_global_scale"] = _at_least_1d(grid.outer)
    else:
        tensors = {"weight": codes, "weight_scale": scale.to(dtype)}
        if grid.zero is not None:
            tensors["weight_zero_point"] = _at_least_1d(grid.zero)
    if g_idx is not None:
        tensors["weight_g_idx"] = g_idx.to(torch.int32)
    if input_grid is not None:
        tensors["input_scale"] = _at_least_1d(input_grid.scale).to(dtype)
        if input_grid.zero is not None:
            tensors["input_zero_point"] = _at_least_1d(input_grid.zero)
    return tensors


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, columns: int) -> Stored:
    """Return what stored tensors hold; `columns` is the number of inputs. The inverse of `encode`, bit for bit."""
    weights = scheme.weights
    scale, zero, outer = tensors["weight_scale"], tensors.get("weight_zero_point"), tensors.get("weight_global_scale")
    layout = format_of(scheme)
    if layout == "pack-quantized":
        codes = unpack(tensors["weight_packed"], scheme.bits, columns)
        zero = None if zero is None else unpack(zero, scheme.bits, codes.shape[0], packed_dim=0)
    elif layout.endswith("fp4-pack-quantized"):
        codes = unpack_fp4(tensors["weight_packed"])
        scale = unpack_e8m0(scale) if weights.scale_format == "e8m0" else scale
    else:
        codes = tensors["weight"]
    grid = Grid(_as_grid(scale.float(), weights.granularity), None if zero is None else _as_grid(zero, weights.granularity), outer)
    return Stored(codes, grid, tensors.get("weight_g_idx"), decode_input(tensors, scheme))


def decode_input(tensors: Mapping[str, Tensor], scheme: Scheme) -> Grid | None:
    """Return the grid of static inputs, or None when inputs are float or measured at run time."""
    if scheme.inputs is None or scheme.inputs.dynamic:
        return None
    zero, granularity = tensors.get("input_zero_point"), scheme.inputs.granularity
    return Grid(_as_grid(tensors["input_scale"].float(), granularity), None if zero is None else _as_grid(zero, granularity))


def blank(
    in_features: int, out_features: int, scheme: Scheme, dtype: torch.dtype, device: torch.device | str | None, act_order: bool = False
) -> dict[str, Tensor]:
    """Return tensors of the right names, shapes and dtypes with nothing in them, to be filled by a checkpoint."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weights = scheme.weights
    grid_shape = _grid_shape(weights.granularity, in_features, out_features)
    layout = format_of(scheme)
    scale_dtype, zero_shape, zero_dtype = dtype, grid_shape, weights.format.storage
    if layout == "pack-quantized":
        tensors = {"weight_packed": empty(out_features, words_of(in_features, scheme.bits), dtype=torch.int32)}
        tensors["weight_shape"] = empty(2, dtype=torch.int64)
        zero_shape, zero_dtype = (words_of(out_features, scheme.bits), grid_shape[-1]), torch.int32
    elif layout.endswith("fp4-pack-quantized"):
        tensors = {"weight_packed": empty(out_features, in_features // 2, dtype=torch.uint8)}
        scale_dtype = torch.uint8 if weights.scale_format == "e8m0" else torch.float8_e4m3fn
        if weights.scale_format == "e4m3":
            tensors["weight_global_scale"] = empty(1, dtype=torch.float32)
    else:
        tensors = {"weight": empty(out_features, in_features, dtype=weights.format.storage)}
    tensors["weight_scale"] = empty(*grid_shape, dtype=scale_dtype)
    if not weights.symmetric:
        tensors["weight_zero_point"] = empty(*zero_shape, dtype=zero_dtype)
    if act_order:
        tensors["weight_g_idx"] = empty(in_features, dtype=torch.int32)
    if scheme.inputs is not None and not scheme.inputs.dynamic:
        count = scheme.inputs.granularity.count if isinstance(scheme.inputs.granularity, PerStep) else 1
        tensors["input_scale"] = empty(count, dtype=dtype)
        if not scheme.inputs.symmetric:
            tensors["input_zero_point"] = empty(count, dtype=scheme.inputs.format.storage)
    return tensors


def _grid_shape(granularity: Granularity, in_features: int, out_features: int) -> tuple[int, ...]:
    match granularity:
        case PerGroup(size):
            return out_features, -(-in_features // size)
        case PerBlock(rows, columns):
            return -(-out_features // rows), -(-in_features // columns)
        case PerTensor():
            return (1,)
        case _:
            return out_features, 1


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _as_grid(tensor: Tensor, granularity: Granularity) -> Tensor:
    return tensor.reshape(()) if isinstance(granularity, PerTensor) else tensor
