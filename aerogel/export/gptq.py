"""The GPTQ layout, for engines that read it (GPTQModel, vLLM, SGLang, ExLlama): qweight, qzeros, scales and g_idx.

Codes are unsigned and lie in a stream of bits down each column of the transposed weight. Version 1 of the layout stores zero points minus
one; readers add one to whole words, which spills into the neighbour where a zero point is 0, and so refuse asymmetric weights in it.
Those are written as version 2, which stores zero points as they are. O outputs, I inputs, G groups.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.export import engine_rules
from aerogel.export.exporter import Exporter, Master, Source, not_language, unsuitable_layers
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards
from aerogel.layers.layout import Stored, format_of
from aerogel.layers.replacement import Assigned
from aerogel.numerics.packing import pack
from aerogel.numerics.scheme import PerTensor, Scheme
from aerogel.options import Bytes

_BITS = (2, 3, 4, 8)
_LANES = 32
"""Codes whose bits fill whole words whatever their width."""


@dataclass(frozen=True)
class GptqLayout(Exporter):
    """GPTQ's layout: integer weights of 2, 3, 4 or 8 bits in groups or channels; version 1, or 2 when a scheme is asymmetric."""

    max_shard_size: Bytes = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Other formats, quantized inputs, and sizes that do not divide by 32."""
        master = Master.open(source)
        return not_language(master) or unsuitable_layers(master, partial(_reason, master))

    def write(self, source: Source, output: Path) -> None:
        """Write the layout linear by linear; scales keep their dtype."""
        self.accept(source)
        master = Master.open(source)
        settings = _settings(master)
        _warn_of_mixed_sets(master)
        with new_folder(output) as target:
            copy_companions(source.folder, target)
            write_shards(target, _tensors(master), max_shard_size=self.max_shard_size)
            (target / "config.json").write_text(json.dumps(master.config | {"quantization_config": settings}, indent=2) + "\n")
            (target / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _warn_of_mixed_sets(master: Master) -> None:
    """Warn of fused sets that are quantized in part or unequally: readers of single layers open them, those of whole sets do not.

    vLLM compares the layers of a set and refuses it; SGLang looks for the set's own name in `dynamic`, and takes it for quantized.
    """
    layers, skipped = engine_rules.quantized(master), engine_rules.unquantized(master)
    found = [*engine_rules.mixed(layers, skipped), *engine_rules.unequal(master)]
    if found:
        more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        warnings.warn(f"vLLM and SGLang do not open this folder, GPTQModel and transformers do: {found[0]}{more}", stacklevel=3)


def _reason(master: Master, name: str) -> str | None:
    scheme = master.linears[name].scheme
    rows, columns = master.shape(name)
    if format_of(scheme) != "pack-quantized" or scheme.bits not in _BITS or isinstance(scheme.weights.granularity, PerTensor):
        return f"{scheme} is no weight-only integer scheme of 2, 3, 4 or 8 bits with groups or channels"
    if rows % _LANES or columns % _LANES:
        return f"{rows} x {columns} is not divisible by {_LANES} both ways"
    return None


def _tensors(master: Master) -> Iterator[tuple[str, Tensor]]:
    def on_disk(name: str) -> str:
        return master.checkpoint.new_on_disk(name) or master.names.on_disk(name)

    for name in master.floats:
        yield on_disk(name), master.checkpoint.tensor(name)
    zero_offset = 1 if _version(master) == "gptq" else 0
    for name, assigned in master.linears.items():
        dtype = master.checkpoint.dtype(f"{name}.weight_scale")
        for part, tensor in layout(master.stored(name), assigned.scheme, dtype, zero_offset).items():
            yield on_disk(f"{name}.{part}"), tensor


def layout(stored: Stored, scheme: Scheme, dtype: torch.dtype, zero_offset: int) -> dict[str, Tensor]:
    """Return qweight (I * bits / 32, O), qzeros (G, O * bits / 32), scales (G, O) and g_idx (I) of one linear."""
    codes_OI, grid, g_idx, _ = stored
    zero_OG = torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero is None else grid.zero
    if g_idx is None:
        columns = codes_OI.shape[1]
        g_idx = torch.arange(columns, dtype=torch.int32) // (scheme.group or columns)
    return {
        "qweight": pack(codes_OI, scheme.bits).T.contiguous(),
        "qzeros": pack(zero_OG.T - zero_offset, scheme.bits),
        "scales": grid.scale.T.to(dtype).contiguous(),
        "g_idx": g_idx,
    }


def _settings(master: Master) -> dict[str, Any]:
    """Return the content of quantize_config.json: the most frequent scheme, and every linear that differs from it by name."""
    common = Counter(tuple(_options(assigned).items()) for assigned in master.linears.values()).most_common(1)[0][0]
    different = {name: _options(assigned) for name, assigned in master.linears.items() if tuple(_options(assigned).items()) != common}
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in master.quantization.get("ignore", ()) if name != "lm_head"}
    dynamic |= {f"+:^{re.escape(name)}$": options for name, options in different.items()}
    return {
        "quant_method": "gptq",
        **dict(common),
        "lm_head": "lm_head" in master.linears,
        "checkpoint_format": _version(master),
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": ["aerogel"]},
    }


def _version(master: Master) -> str:
    return "gptq" if all(assigned.scheme.weights.symmetric for assigned in master.linears.values()) else "gptq_v2"


def _options(assigned: Assigned) -> dict[str, Any]:
    scheme = assigned.scheme
    return {"bits": scheme.bits, "group_size": scheme.group or -1, "sym": scheme.weights.symmetric, "desc_act": assigned.act_order}
