"""The master format, for engines that read compressed-tensors: the same tensors without this package's own files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source, inexpressible
from aerogel.io.packed_words import FIRST, padded
from aerogel.io.quantized import OWN
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
            write_shards(target, tensors, max_shard_size=self.max_shard_size)
