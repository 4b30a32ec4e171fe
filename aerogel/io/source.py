"""Where a model is found on this disk and how it is opened, so that it can be opened again in the same way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aerogel.errors import AerogelError, nearest
from aerogel.io import adapters, hub
from aerogel.io.reference import REFERENCES, folder_of


@dataclass(frozen=True)
class ModelSource:
    """A model in a folder, and how to open it."""

    name: str
    """The folder, the hub id or the reference model, as it was asked for."""
    folder: Path
    """The folder that holds it."""
    revision: str | None = None
    """The commit of a model of the hub."""
    dtype: torch.dtype | None = None
    """The dtype to compute in; None is that of the checkpoint, where the device computes in it."""
    trust_remote_code: bool = False
    """Python files of the model may be run."""
    adapter: Path | None = None
    """Folder of a LoRA adapter that is merged into the weights."""

    def __str__(self) -> str:
        return self.name

    @property
    def known_as(self) -> str:
        """The name that others know the model by: of a local folder only its last part."""
        return self.folder.name if Path(self.name).expanduser().exists() else self.name

    def at(self, folder: Path) -> ModelSource:
        """Return how to open another folder in the same way, such as what this model was compressed to."""
        return replace(self, name=str(folder), folder=folder, revision=None, adapter=None)


def locate(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
) -> ModelSource:
    """Find a model by a folder, the name of a reference model or a hub id, and fetch it from the hub where it is not in the cache.

    Of a LoRA adapter it is the base model, with the adapter to be merged, if `merge_adapter` asks for that. Raises AerogelError when there
    is none, with the nearest names, when the hub does not give it, for a revision of a model that is not from the hub, and for an adapter
    otherwise.
    """
    given, folder = str(name), Path(name).expanduser()
    on_hub = not folder.exists() and given not in REFERENCES and hub.ID.fullmatch(given) is not None
    if folder.exists() and not folder.is_dir():
        raise AerogelError(f"{given} is a file; give the folder that holds it and its config.json")
    if not (on_hub or folder.is_dir() or given in REFERENCES):
        raise AerogelError(f"{given!r} is no folder, no hub id (owner/name){nearest(given, REFERENCES)}")
    if revision is not None and not on_hub:
        raise AerogelError(f"a revision ({revision!r}) is of a model on the hub, and {given} is not from there; leave --revision out")
    if on_hub:
        fetched = hub.fetch(given, revision, trust_remote_code)
        found = ModelSource(given, fetched, _commit(fetched), dtype, trust_remote_code)
    else:
        found = ModelSource(given, folder if folder.is_dir() else folder_of(given), None, dtype, trust_remote_code)
    adapter = adapters.adapter_in(found.folder)
    return found if adapter is None else _with_base(found, adapter, merge_adapter)


def _with_base(source: ModelSource, adapter: adapters.Adapter, merge: bool) -> ModelSource:
    """Return the base model of an adapter with the adapter to be merged; raises AerogelError unless that is asked for."""
    if not merge:
        raise AerogelError(
            f"{source.name} is an adapter of {adapter.base}; add --merge-adapter, in Python aerogel.load(..., merge_adapter=True), to "
            "merge it into that model"
        )
    adapters.require_mergeable(adapter)
    base = locate(adapter.base, dtype=source.dtype, trust_remote_code=source.trust_remote_code)
    return replace(base, name=source.name, revision=source.revision, adapter=source.folder)


def _commit(snapshot: Path) -> str | None:
    """The commit that a folder in the hub's cache is of."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None
