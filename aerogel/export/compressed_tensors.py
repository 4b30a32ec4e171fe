"""The master format, for engines that read compressed-tensors: the same tensors without this package's own files."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source, inexpressible
from aerogel.io import quantization_schema
from aerogel.io.packed_words import FIRST, padded
from aerogel.io.quantized import OWN, configs_in
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards
from aerogel.options import Bytes


@dataclass(frozen=True)
class CompressedTensors(Exporter):
    """The folder as compressed-tensors readers (transformers, vLLM) expect it, with new shards and without files of Aerogel."""

    max_shard_size: Bytes = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Return the layers that are more than a quantized linear, or the other format that the folder is in."""
        master = Master.open(source)
        if (method := master.quantization.get("quant_method", OWN[0])) not in OWN:
            return [f"it is quantized in another format, {method}; compress it first"]
        return [f"{reason}, which compressed-tensors cannot say" for reason in inexpressible(master)]

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True where engines read it in quantization_config."""
        return bool(policy.method.config_entries)

    def write(self, source: Source, output: Path) -> None:
        """Copy tensor by tensor; names and values stay as they are, but for integer codes in words of an earlier release."""
        self.accept(source)
        master = Master.open(source)
        tensors = ((master.checkpoint.on_disk(name), master.checkpoint.tensor(name)) for name in master.checkpoint.names())
        with new_folder(output) as target:
            copy_companions(source.folder, target)
            if padded(master.quantization):
                config = master.config | {"quantization_config": master.quantization | {"version": FIRST}}
                (target / "config.json").write_text(json.dumps(config, indent=2))
            if quantization_schema.masked_tensors(master.quantization):
                (target / "config.json").write_text(json.dumps(_with_dense_weights(master), indent=2) + "\n")
            write_shards(target, tensors, max_shard_size=self.max_shard_size)


def _with_dense_weights(master: Master) -> dict[str, Any]:
    """Return the config without bit masks, and without a quantization_config where nothing is quantized."""
    config = copy.deepcopy(master.config)
    for each in configs_in(config):
        if isinstance(found := each.get("quantization_config"), dict):
            del found["sparsity_config"]
            if not found["config_groups"] and not found.get("kv_cache_scheme"):
                del each["quantization_config"]
    return config
