"""The AWQ layout of AutoAWQ, version "gemm", for vLLM, SGLang and transformers: qweight, qzeros and scales.

Integer codes are unsigned; eight neighbouring outputs of one input are in a word, in the order below. value = (code - zero) * scale.
Readers subtract zero points in any case, so that symmetric weights get zero points of 8 and `zero_point` is always true.
O outputs, I inputs, G groups.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.export.engine_rules import on_disk, unquantized, violations
from aerogel.export.exporter import Exporter, Master, Source, not_language, unsuitable_layers
from aerogel.io.quantized import configs_in
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards
from aerogel.layers.layout import Stored, format_of
from aerogel.numerics.packing import pack
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerTensor, Scheme
from aerogel.options import Bytes

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight neighbours, that each place in a word holds; the first place has the lowest bits."""
_SIZES = (-1, 16, 32, 64, 128)
"""Group sizes that readers have kernels for; -1 is a channel."""
_SCALES = torch.float16


@dataclass(frozen=True)
class AwqLayout(Exporter):
    """AutoAWQ's layout, version gemm: integer weights of 4 bits in groups or channels, symmetric or not, unchanged."""

    max_shard_size: Bytes = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Other bits and formats, quantized inputs, activation order, several group sizes, and scales that float16 does not hold."""
        master = Master.open(source)
        if reasons := not_language(master) or unsuitable_layers(master, partial(_reason, master)):
            return reasons
        sizes = sorted({_group_size(assigned.scheme) for assigned in master.linears.values()})
        if len(sizes) > 1:
            told = ", ".join("channels" if size == -1 else str(size) for size in sizes)
            reasons.append(f"its layers have several group sizes ({told}), and this format has one for all")
        reasons += [f"{name}: {reason}" for name in master.linears if (reason := _scale_reason(master, name))]
        return reasons + violations(master)

    def write(self, source: Source, output: Path) -> None:
        """Write the layout layer by layer; scales become float16."""
        self.accept(source)
        master = Master.open(source)
        config = copy.deepcopy(master.config)
        for part in configs_in(config):
            part.pop("quantization_config", None)
        with new_folder(output) as target:
            copy_companions(source.folder, target)
            write_shards(target, _tensors(master), max_shard_size=self.max_shard_size)
            config["quantization_config"] = _settings(master)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def layout(stored: Stored) -> dict[str, Tensor]:
    """Return qweight (I, O / 8), qzeros (G, O / 8) and scales (G, O) of one layer."""
    codes_OI, grid, _, _ = stored
    return {
        "qweight": pack(_interleaved(codes_OI.T), _BITS),
        "qzeros": pack(_interleaved(_zeros(grid).T), _BITS),
        "scales": _in_half(grid.scale).T.contiguous(),
    }


def _interleaved(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, len(_ORDER)))[..., list(_ORDER)].flatten(-2)


def _in_half(scale: Tensor) -> Tensor:
    """Scales in float16, finite also where a scale belongs to weights that are all 0."""
    return scale.clamp(max=torch.finfo(_SCALES).max).to(_SCALES)


def _reason(master: Master, name: str) -> str | None:
    assigned = master.linears[name]
    scheme, outputs = assigned.scheme, master.shape(name)[0]
    if format_of(scheme) != "pack-quantized" or scheme.inputs is not None or scheme.bits != _BITS or _per_tensor(scheme):
        return f"{scheme} is no weight-only integer scheme of 4 bits with groups or channels"
    if assigned.act_order:
        return "its groups follow activation order, groups of this format follow column order; set act_order to static"
    if _group_size(scheme) not in _SIZES:
        return f"groups of {scheme.group} have no kernels in readers of this format, which take 16, 32, 64, 128 or channels"
    return f"{outputs} outputs are not divisible by {len(_ORDER)}" if outputs % len(_ORDER) else None


def _per_tensor(scheme: Scheme) -> bool:
    return isinstance(scheme.weights.granularity, PerTensor)


def _scale_reason(master: Master, name: str) -> str | None:
    """Return a scale that float16 does not hold exactly, unless all weights under it are 0 anyway."""
    scale_OG = master.checkpoint.tensor(f"{name}.weight_scale").float()
    rounded_OG = _in_half(scale_OG).float()
    if rounded_OG.equal(scale_OG):
        return None
    changed_OG = (rounded_OG != scale_OG) & ~_zero_groups(master.stored(name))
    if not bool(changed_OG.any()):
        return None
    dtype = str(master.checkpoint.dtype(f"{name}.weight_scale")).removeprefix("torch.")
    return (
        f"the scale {float(scale_OG[changed_OG][0]):.9g} ({dtype}) has no exact value in float16, which this format stores; "
        "the format gptq keeps scales as they are"
    )


def _zero_groups(stored: Stored) -> Tensor:
    """Return the (O, G) groups in which each integer code is the zero point."""
    codes_OI, grid, _, _ = stored
    codes_OGg = codes_OI.unflatten(1, (grid.scale.shape[1], -1))
    return (codes_OGg == _zeros(grid).unsqueeze(-1)).all(-1)


def _zeros(grid: Grid) -> Tensor:
    return torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero is None else grid.zero


def _group_size(scheme: Scheme) -> int:
    return scheme.group or -1


def _tensors(master: Master) -> Iterator[tuple[str, Tensor]]:
    for name in master.floats:
        yield on_disk(master, name), master.checkpoint.tensor(name)
    for name in master.linears:
        for part, tensor in layout(master.stored(name)).items():
            yield on_disk(master, f"{name}.{part}"), tensor


def _settings(master: Master) -> dict[str, Any]:
    """Return the quantization_config."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": _BITS,
        "group_size": _group_size(next(iter(master.linears.values())).scheme),
        "zero_point": True,
        "modules_to_not_convert": unquantized(master),
    }
