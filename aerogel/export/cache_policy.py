"""A caching policy without the weights: what it caches at which steps, which model it was calibrated on and what it saves."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source
from aerogel.io.fingerprint import fingerprint
from aerogel.io.record import files
from aerogel.io.record.schema import ModelRecord, Record
from aerogel.io.save import new_folder
from aerogel.io.states import FILES, file_in
from aerogel.runtime.feature_cache.streams import FeatureCacheState


@dataclass(frozen=True)
class CachePolicy(Exporter):
    """The folder's policies without its weights, for `aerogel.cached` to put on any pipeline with these weights."""

    def refuse(self, source: Source) -> list[str]:
        """A folder without a caching policy has nothing to give."""
        return [] if caching(source) else ["it has no caching policy; compress with a recipe that has one, such as harmonica"]

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True: they are all that is written."""
        return True

    def write(self, source: Source, output: Path) -> None:
        """Write output/aerogel.json and, where policies have tensors, the file with these."""
        self.accept(source)
        folder = source.folder
        whole = files.read(folder)
        master = Master.open(source.denoiser)
        weights = ((name, master.checkpoint.tensor(name)) for name in master.checkpoint.names())
        model = whole.model.as_dict() | {"fingerprint": fingerprint(weights), "quantization": master.quantization or None}
        with new_folder(output) as target:
            record = Record(
                schema_number=whole.schema_number,
                model=ModelRecord(**model),
                recipe=whole.recipe,
                provenance=whole.provenance,
                policies=whole.policies,
                checksums={file: checksum for file, checksum in whole.checksums.items() if file in FILES},
            )
            files.write(target, record)
            if (name := file_in(folder)) is not None:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / name)


def caching(source: Source) -> SavedPolicy | None:
    """Return the folder's feature-caching policy, of which there is one at most; None without one."""
    return next((policy for policy in source.policies if isinstance(policy.state, FeatureCacheState)), None)
