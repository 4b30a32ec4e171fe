"""Datasets through the `datasets` library: folders saved by it, datasets of the hub, and its objects."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from aerogel.data.files import Record
from aerogel.errors import AerogelError, nearest

ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/]*(:[^/]+)?)?")
"""Form of a dataset of the hub: owner/name, owner/name:config or owner/name:config:split."""
_PATIENCE = 10.0
"""Seconds until the hub counts as not reached."""
_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_saved(path: Path) -> bool:
    """Return True for a folder that `save_to_disk` wrote."""
    return any((path / name).is_file() for name in _SAVED) and ((path / _SAVED[1]).is_file() or (path / "state.json").is_file())


def is_dataset(source: Any) -> bool:
    """Return True for an object of the datasets library, which is imported where there is one."""
    library = sys.modules.get("datasets")
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return library is not None and isinstance(source, tuple(getattr(library, kind) for kind in kinds))


def columns_of(rows: Any) -> list[str]:
    """Return the columns of a dataset, of several splits those of train; none where they are not known before it is read."""
    of = rows.get("train") if isinstance(rows, dict) else rows
    return [] if of is None else list(of.column_names or ())


def saved(path: Path) -> Iterator[Record]:
    """Yield the rows of a folder written by `save_to_disk`; of several splits those of train."""
    library = _library(f"reading the dataset folder {path}")
    with _explained(f"{path} cannot be read as a folder saved by datasets"):
        rows = library.load_from_disk(str(path))
    if isinstance(rows, library.DatasetDict) and "train" not in rows:
        folders = ", ".join(str(path / name) for name in rows)
        raise AerogelError(f"{path} has no split called train; give the folder of one split: {folders}")
    return rows_of(rows, str(path))


def rows_of(rows: Any, name: str) -> Iterator[Record]:
    """Yield the rows of a dataset; of several splits those of train."""
    if isinstance(rows, dict):
        if "train" not in rows:
            raise AerogelError(f"{name} has no split called train; give one of its splits: {', '.join(map(str, rows))}")
        rows = rows["train"]
    given = iter(rows.with_format(None))
    number = 0
    while True:
        with _explained(f"{name} row {number} cannot be read"):
            row = next(given, None)
        if row is None:
            return
        yield Record(row, f"{name} row {number}")
        number += 1


def from_hub(source: str, shipped: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a dataset of the hub, which are fetched as they are read; without a connection, those in the library's cache.

    Raises AerogelError when there is none that may be read, for a config or split that it has not, and when the hub is not reached.
    """
    name, config, split = (*source.split(":", 2), "", "")[:3]
    what = f"no text source {source!r}: no such file or folder, and as a dataset of the hub"
    library = _library(f"{what} it")
    offline = library.config.HF_HUB_OFFLINE
    if not offline:
        _find(name, f"{what} it", nearest(source, shipped))
    # A slice of a split is not to be had as a stream.
    streaming = not offline and "[" not in split
    with _explained(f"dataset {source!r} of the hub cannot be read"), _without_bars(library):
        rows = library.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    return rows_of(rows, source)


def _find(name: str, what: str, near: str) -> None:
    """See whether the hub has a dataset; in one request, as the library tries six times where there is no connection."""
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_PATIENCE)
    except errors.GatedRepoError as error:
        raise AerogelError(f"dataset {name} is gated: accept its terms on its page, and set HF_TOKEN to a token of that account") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise AerogelError(f"{what} is not there or private (HF_TOKEN){near}") from error
    except (errors.HTTPError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise AerogelError(f"{what} cannot be reached ({reason}); check the name and the connection{near}") from error


def _library(what: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise AerogelError(f"{what} needs the datasets package: pip install 'aerogel[datasets]'") from error
    return datasets


@contextmanager
def _without_bars(library: ModuleType) -> Iterator[None]:
    """Keep the progress bars of the library out while the context lasts."""
    if library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever the library, or the code of a file system below it, raises into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AerogelError(f"{what} ({reason})") from error
