"""Where a model is found on this disk and how it is opened, so that it can be opened again in the same way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aerogel.errors import AerogelError, nearest
from aerogel.io import hub
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

    def __str__(self) -> str:
        return self.name

    @property
    def known_as(self) -> str:
        """The name that others know the model by: of a local folder only its last part."""
        return self.folder.name if Path(self.name).expanduser().exists() else self.name

    def at(self, folder: Path) -> ModelSource:
        """Return how to open another folder in the same way, such as what this model was compressed to."""
        return replace(self, name=str(folder), folder=folder, revision=None)


def locate(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model by a folder, the name of a reference model or a hub id, and fetch it from the hub where it is not in the cache.

    Raises AerogelError when there is none, with the nearest names, when the hub does not give it, and for a revision of a model that is
    not from the hub.
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
        return ModelSource(given, fetched, _commit(fetched), dtype, trust_remote_code)
    return ModelSource(given, folder if folder.is_dir() else folder_of(given), None, dtype, trust_remote_code)


def _commit(snapshot: Path) -> str | None:
    """The commit that a folder in the hub's cache is of."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None
