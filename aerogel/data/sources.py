"""Sources of records: shipped text, files, folders, datasets of the hub, and strings or records that are given in Python.

Where a name could be several things, shipped text wins over a file or folder, and those over a dataset of the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aerogel.data import datasets_library, files
from aerogel.data.files import Record
from aerogel.data.unpacking import PACKED, is_packed
from aerogel.errors import AerogelError

SHIPPED = tuple(sorted(path.name.removesuffix(".txt.gz") for path in Path(__file__).parent.glob("*.txt.gz")))
"""Names of the text that comes with the package; SOURCES.md says what each one is."""
FORMATS = (
    "a .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow (each also as .gz, .bz2, .xz or .zst), a folder of them or one saved by datasets"
)
GIVEN = "given data"
"""Name in a run's record of what no file can name."""
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
_SPLIT = re.compile(r"(?<![a-z])(train(ing)?|test(ing)?|eval(uation)?|dev(elopment)?|val(id|idation)?)(?![a-z])")
"""Words in the names of files and folders that say of which split they are."""
_MOST_ENTRIES = 10_000
"""Files and folders that are looked at in a folder of data files."""


def is_named(source: Any) -> bool:
    """Return True for the name or path of a source; False for what is given in Python."""
    return isinstance(source, str | Path)


def is_table(source: Any) -> bool:
    """Return True for a table of pyarrow or pandas, whose items are columns and not rows."""
    return hasattr(source, "columns") and (hasattr(source, "to_pylist") or hasattr(source, "to_dict"))


def is_streamed(source: Any) -> bool:
    """Return True where a source may have no end, or is fetched as it is read: a dataset of the hub, and what is given in Python."""
    return not is_named(source) or not (str(source) in SHIPPED or os.path.lexists(source))


def name_of(source: Any) -> str:
    """Return what a run's record calls a source."""
    return str(source) if is_named(source) else GIVEN


def records(source: Any) -> Iterator[Record]:
    """Yield the records of a source in order.

    Raises AerogelError when there is no such source, when it cannot be read, and for a folder in which several things could be meant.
    """
    if not is_named(source):
        return _given(source)
    if str(source) in SHIPPED:
        return files.records(Path(__file__).parent / f"{source}.txt.gz")
    path = Path(source)
    if not str(source).strip():
        raise AerogelError(f"the name of the text source is empty; give {FORMATS}, or one of: {', '.join(SHIPPED)}")
    try:
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise AerogelError(f"{str(source)[:80]!r} is no name of a file ({error}); give {FORMATS}") from error
    if is_dir:
        return datasets_library.saved(path) if datasets_library.is_saved(path) else _folder(path)
    if exists:
        return files.records(path)
    if datasets_library.ID.fullmatch(str(source)) and Path(source).suffix.lower() not in (*files.FORMATS, *PACKED):
        return datasets_library.from_hub(str(source), SHIPPED)
    raise AerogelError(f"no text source {str(source)!r}; give {FORMATS}, a dataset of the hub, or one of: {', '.join(SHIPPED)}")


def _folder(path: Path) -> Iterator[Record]:
    """The data files in a folder: those of the training split where names say splits; all in one folder and of one format."""
    if any((path / name).is_file() for name in ("config.json", "model_index.json")):
        raise AerogelError(f"{path} is the folder of a model, not of data; give {FORMATS}")
    found = sorted(_data_files(path))
    if not found:
        raise AerogelError(f"{path} is not a folder saved by datasets (save_to_disk) and has no data files in it; give {FORMATS}")
    if of_splits := [file for file in found if _SPLIT.search(_within(file, path))]:
        if not (chosen := [file for file in of_splits if _TRAIN.search(_within(file, path))]):
            raise AerogelError(f"{path} has no split called train; give one of its files: {_listed(of_splits)}")
        found = chosen
    for what, kinds in (("folders", {file.parent for file in found}), ("formats", {files.format_of(file) for file in found})):
        if len(kinds) > 1:
            raise AerogelError(f"{path} has data files in several {what}; give one of them: {_listed(kinds)}")
    return (record for file in found for record in files.records(file))


def _data_files(path: Path) -> Iterator[Path]:
    """The files of a known format at most two folders deep; hidden ones are left out."""
    seen = 0
    for folder, below, names in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        below[:] = sorted(name for name in below if not name.startswith((".", "__"))) if depth < 2 else []
        seen += len(below) + len(names)
        if seen > _MOST_ENTRIES:
            raise AerogelError(f"{path} has more than {_MOST_ENTRIES:,} files and folders in it; give the folder of the data files alone")
        for name in names:
            ends = Path(Path(name).stem if is_packed(Path(name)) else name).suffix.lower()
            if ends in files.FORMATS and not name.startswith((".", "_")) and name.lower() not in _NO_DATA:
                yield Path(folder) / name


_NO_DATA = ("requirements.txt", "license.txt", "readme.txt", "dataset_info.json", "dataset_infos.json", "state.json")


def _within(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)).lower()


def _listed(things: Iterable[Any]) -> str:
    found = sorted(map(str, things))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _given(source: Any) -> Iterator[Record]:
    """Strings or records given in Python: a list or an iterable of them or of batches of them, or a dataset."""
    if datasets_library.is_dataset(source):
        return datasets_library.rows_of(source, "given dataset")
    if is_table(source):
        source = source.to_pylist() if hasattr(source, "to_pylist") else source.to_dict("records")
    if isinstance(source, Mapping):
        source = [source]
    if not isinstance(source, Iterable):
        raise AerogelError(f"text is given as {type(source).__name__}, expected strings or records in a list, a dataset, or a file's name")
    return (Record(value, f"document {number}") for number, value in enumerate(_unbatched(source)))


def _unbatched(source: Iterable[Any]) -> Iterator[Any]:
    """Strings and records, also those in batches, as a DataLoader makes them."""
    for value in source:
        if isinstance(value, list | tuple):
            yield from value
        elif isinstance(value, Mapping) and isinstance(texts := value.get("text"), list | tuple):
            yield from texts
        else:
            yield value
