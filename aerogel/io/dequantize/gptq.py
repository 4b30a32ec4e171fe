"""gptq: integer codes as AutoGPTQ, GPTQModel and our own exporter lay them out, in 2, 3, 4 or 8 bits.

`qweight` (I * bits / 32, O) and `qzeros` (G, O * bits / 32) are streams of bits in int32 words: 32 codes of 3 bits fill 3 words. `scales`
(G, O); `g_idx` (I) is the group of each input. The weight is (code - zero) * scale of its group. Version 1 (`gptq`) stores zero points
minus one, version 2 (`gptq_v2`) as they are.
"""

from __future__ import annotations

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
from aerogel.io.dequantize.checks import FLOATS, Tensors, group_of, group_size, one_of
from aerogel.io.headers import Entry
from aerogel.numerics.packing import unpack

_BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""Number to add to zero points on disk, by checkpoint_format."""


@dataclass(frozen=True)
class _Settings:
    """Settings of a quantization_config for all layers."""

    bits: frozenset[int]
    groups: frozenset[int]
    """Sizes, -1 for whole rows; several where single layers have their own."""
    in_order: bool
    """True where the groups of a layer without g_idx are runs of inputs."""
    added: int


@dataclass(frozen=True)
class Layout:
    """Layout of one weight."""

    name: str
    """Name of its module."""
    bits: int
    inputs: int
    group: int
    added: int
    """Number to add to the zero points."""


def dequantizer(config: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Dequantize:
    """Return what finds the quantized weights of a folder; raises AerogelError on settings that the layout does not have."""
    one_of(config, where, ("pack_dtype",), ("int32",), "int32")
    one_of(config, where, ("is_marlin_format",), (False,), False)  # words in another order
    added = _VERSIONS[one_of(config, where, ("checkpoint_format", "format"), _VERSIONS, "gptq")]
    layers = [config, *_single(config, where)]
    bits = frozenset(one_of(each, where, ("bits",), _BITS) for each in layers if each is config or "bits" in each)
    groups = frozenset(group_size(each, where) for each in layers if each is config or "group_size" in each)
    return partial(_weights, where, dtype, _Settings(bits, groups, config.get("desc_act") is not True, added))


def dequantize_gptq(
    qweight: Tensor, qzeros: Tensor, scales_GO: Tensor, g_idx: Tensor | None = None, *, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return the weight_OI; raises AerogelError on a group that does not exist and on zero points that readers disagree about."""
    groups, outputs = scales_GO.shape
    if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise AerogelError(
            f"{layout.name}.g_idx names the groups {int(g_idx.min())} to {int(g_idx.max())}, and {layout.name}.scales has {groups}; "
            "get the files of one model"
        )
    codes_OI = unpack(qweight.T, layout.bits, layout.inputs)
    zero_GO = unpack(qzeros, layout.bits, outputs)
    if layout.added and int(zero_GO.max()) == (1 << (layout.bits - 1)) - 1:
        raise AerogelError(
            f"{layout.name}.qzeros has a zero point of 0, which version 1 of the GPTQ layout cannot hold: readers take it for different "
            "numbers; get the model in gptq_v2, or in 16 bits"
        )
    zero_OG = zero_GO.T.short() + layout.added
    column_I = None if g_idx is None else g_idx.long()
    return dequantize_blocks(codes_OI, scales_GO.T, (1, layout.group), dtype, zero_OG, column_I)


def _single(config: Mapping[str, Any], where: Path) -> list[Mapping[str, Any]]:
    """Settings of single layers, by patterns of which some leave layers out; which layer has which, the shapes of its tensors say."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(one, dict) for one in dynamic.values()):
        raise AerogelError(f"{where}: dynamic is {dynamic!r:.80}, expected settings by pattern; fetch config.json again")
    return list(dynamic.values())


def _weights(where: Path, dtype: torch.dtype, settings: _Settings, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    """Find the weights NAME.weight in NAME.qweight, NAME.qzeros, NAME.scales and NAME.g_idx."""
    tensors = Tensors(where, "gptq", on_disk.entries)
    found: dict[str, Dequantized | None] = {}
    for values in on_disk.entries:
        name = values.removesuffix(".qweight")
        if name == values:
            continue
        layout = _layout(tensors, settings, name)
        outputs = on_disk.entries[values].shape[1]
        parts = [f"{name}.qzeros", f"{name}.scales", *([f"{name}.g_idx"] if f"{name}.g_idx" in on_disk.entries else [])]
        shape = (outputs, layout.inputs)
        told = f"gptq: int{layout.bits} with a scale per {shared_by((1, layout.group), shape)}"
        make = partial(dequantize_gptq, layout=layout, dtype=dtype)
        found[f"{name}.weight"] = Dequantized(values, tuple(parts), Entry.of(dtype, shape), make, (), told, of_linear=True)
    tensors.require_some(found, "no tensor is called NAME.qweight")
    return found


def _layout(tensors: Tensors, settings: _Settings, name: str) -> Layout:
    """Read the layout of a weight off the shapes of its tensors; raises AerogelError where it is not one that the config speaks of."""
    values, zeros, scales, order = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    words, outputs = tensors.matrix(values, values, (torch.int32,))
    groups, packed = tensors.matrix(zeros, values, (torch.int32,))
    bits, rest = divmod(packed * 32, outputs)
    inputs, over = divmod(words * 32, bits or 1)
    size = group_of(settings.groups, inputs, groups)
    if rest or over or bits not in settings.bits or size is None:
        wanted = " or ".join(str(one) for one in sorted(settings.bits))
        sizes = " or ".join(str(one) for one in sorted(settings.groups))
        raise AerogelError(
            f"{tensors.where.parent}: {values} is {[words, outputs]} and {zeros} {[groups, packed]}, which is no weight of {wanted} bits "
            f"in whole groups of {sizes} (bits and group_size in config.json); get the files of one model"
        )
    tensors.expect(scales, values, FLOATS, (groups, outputs))
    if order in tensors.entries:
        tensors.expect(order, values, (torch.int32, torch.int64), (inputs,))
    elif not settings.in_order and groups > 1:
        tensors.required(order, values)
    return Layout(name, bits, inputs, size, settings.added)
