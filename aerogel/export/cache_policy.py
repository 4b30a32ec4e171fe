"""A caching policy by itself: what it reuses when, what it was made for and what it saves, without a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aerogel.export.exporter import Exporter, Master
from aerogel.io.fingerprint import fingerprint
from aerogel.io.load import part_of
from aerogel.io.save import new_folder
from aerogel.io.states import FACTS, STATES, stored

_KEPT = ("schema", "recipe", "provenance", "policies")
"""Facts about the run that hold without its weights."""


@dataclass(frozen=True)
class CachePolicy(Exporter):
    """The folder's policies without its weights, for `aerogel.cached` to put on any pipeline with these weights."""

    def refuse(self, folder: Path) -> list[str]:
        """A folder without a caching policy has nothing to give."""
        return [] if caching(folder) else ["it has no caching policy; compress with a recipe that has one, such as harmonica"]

    def write(self, folder: Path, output: Path) -> None:
        """Write output/aerogel.json and, where policies have tensors, output/aerogel.safetensors."""
        self.accept(folder)
        facts = json.loads((folder / FACTS).read_text())
        master = Master.open(part_of(folder))
        weights = ((name, master.checkpoint.tensor(name)) for name in master.checkpoint.names())
        model = facts["model"] | {"fingerprint": fingerprint(weights), "quantization": master.quantization or None}
        with new_folder(output) as target:
            (target / FACTS).write_text(json.dumps({"model": model} | {key: facts[key] for key in _KEPT}, indent=2) + "\n")
            if (folder / STATES).exists():
                shutil.copyfile(folder / STATES, target / STATES)


def caching(folder: Path) -> tuple[str, Mapping[str, Any], dict[str, Any]] | None:
    """The name, the options and the state of a folder's caching policy, of which there is one at most; None without one."""
    for named, state in stored(folder):
        if {"computed", "blocks"} & state.keys():  # which units compute, or how many blocks there are
            ((name, options),) = named.items()
            return name, options, state
    return None
