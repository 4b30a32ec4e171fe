"""The master format, for engines that read compressed-tensors: the same tensors without this package's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aerogel.export.exporter import Exporter, Master, Source
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards


@dataclass(frozen=True)
class CompressedTensors(Exporter):
    """The folder as compressed-tensors readers (transformers, vLLM) expect it: weights sharded anew, nothing else of ours beside them."""

    max_shard_size: int = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Scaled inputs are the one thing this format has no words for."""
        master = Master.open(source)
        scaled = master.quantization.get("scaled_inputs", ())
        return [f"{name} divides its input by a scale for each channel, which compressed-tensors cannot say" for name in scaled]

    def write(self, source: Source, output: Path) -> None:
        """Copy tensor by tensor; names and values stay as they are."""
        self.accept(source)
        checkpoint = Checkpoint.open(source.folder)
        with new_folder(output) as target:
            copy_companions(source.folder, target)
            write_shards(target, ((name, checkpoint.tensor(name)) for name in checkpoint.names()), max_shard_size=self.max_shard_size)
