"""Bit masks: each pruned weight as one bit an input and the values that are not zero, for smaller files; opened by this package only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.export.engine_rules import denoises
from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source
from aerogel.io import empty_weight
from aerogel.io.bitmask import FORMAT, masked
from aerogel.io.packed_words import FIRST
from aerogel.io.quantized import OWN, configs_in
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards
from aerogel.options import Bytes

_PACKED = "weight_packed"
_FLOAT = {"quant_method": "aerogel", "version": FIRST, "format": "dense", "config_groups": {}, "ignore": []}
"""The quantization_config of a folder in which nothing is quantized."""


@dataclass(frozen=True)
class Bitmask(Exporter):
    """Weights as a bit mask and the values that are not zero, bit for bit, where that is smaller; Aerogel alone opens the folder."""

    max_shard_size: Bytes = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Return the other format that the folder is in, or that no weight of it would be smaller."""
        try:
            master = Master.open(source.denoiser)
        except AerogelError as error:  # several denoisers
            return [str(error)]
        if (method := master.quantization.get("quant_method", OWN[0])) not in OWN:
            return [f"it is quantized in another format, {method}; compress it first"]
        if not any(_stored(master, name) for name in master.checkpoint.names()):
            return ["no weight of it would be smaller; prune it first, for example with --recipe wanda-50"]
        return []

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True where it is in quantization_config."""
        return bool(policy.method.config_entries)

    def write(self, source: Source, output: Path) -> None:
        """Write the folder tensor by tensor; of a pipeline, the sub-folder of its denoiser, with the other parts as they are."""
        self.accept(source)
        part = source.denoiser
        master, place, told = Master.open(part), part.folder.relative_to(source.folder), dict[str, Any]()
        stem = "diffusion_pytorch_model" if denoises(master) else "model"
        with new_folder(output) as target:
            copy_companions(source.folder, target, [str(place)])
            write_shards(target / place, _tensors(master, told), stem, self.max_shard_size)
            (target / place / "config.json").write_text(json.dumps(_config(master, told), indent=2) + "\n")


def _stored(master: Master, name: str) -> Any:
    """Return a tensor as it is stored, with what config.json says of it; None for one that stays as it is."""
    tensor, layer = master.checkpoint.tensor(name), name.rpartition(".")[0]
    if not name.endswith(f".{_PACKED}") or layer not in master.linears:
        return masked(master.checkpoint.on_disk(name), tensor)
    return masked(master.checkpoint.on_disk(name), tensor, master.linears[layer].scheme.bits, master.shape(layer)[1])


def _tensors(master: Master, told: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors to store, and add what config.json says of each to `told`."""
    for name in master.checkpoint.names():
        if (found := _stored(master, name)) is None:
            yield master.checkpoint.on_disk(name), master.checkpoint.tensor(name)
            continue
        tensors, told[master.checkpoint.on_disk(name)] = found[0], found[1].model_dump(exclude_none=True)
        yield from tensors.items()


def _config(master: Master, told: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json."""
    config = copy.deepcopy(master.config)
    home = next((each for each in configs_in(config) if each.get("quantization_config")), config)
    sparsity = {"format": FORMAT, "tensors": told}
    quantization = {key: entry for key, entry in (master.quantization or _FLOAT).items() if key != empty_weight.KEY}
    home["quantization_config"] = quantization | {"version": FIRST, "sparsity_config": sparsity}
    return config
