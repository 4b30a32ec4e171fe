"""Files of records: .txt, .jsonl, .json, .csv, .tsv, .parquet and .arrow, each also packed, read as a stream of one record at a time."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from aerogel.data.json_arrays import items
from aerogel.data.unpacking import check, is_packed, lines, open_bytes, open_text
from aerogel.errors import AerogelError
from aerogel.io.json_files import parse_json

_CHUNK = 2**20
"""Characters of a text that are read at once."""
_DOCUMENT = 2**30
"""Characters of one document at most."""
_WHOLE = 2**27
"""Characters of a JSON object with the records under a key at most: it is read whole."""
_CELL = 2**26
"""Characters of a cell of a .csv at most."""
_ROW_GROUP = 2**32
"""Bytes of a row group of a .parquet at most, unpacked."""
_ROWS = 64
"""Rows of a .parquet or .arrow that are made at once."""
_ARROW_FILE = b"ARROW1"
"""Start of an .arrow with an index of its batches; without it, one follows the other as datasets writes them."""
_ARRAYS = ("data", "train", "rows", "records", "examples", "instances", "samples")
"""Keys under which an object in a .json has its records, the likelier first."""


class Record(NamedTuple):
    """One record of a source."""

    value: Any
    """Text, or an object: columns and what is in them."""
    place: str
    """The source and the line, row or item, for errors."""


def require_unicode(text: str, place: str) -> str:
    """Return a text; raises AerogelError, with the place, for half of a surrogate pair, which JSON can hold and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AerogelError(f"{place} has half of a surrogate pair ({text[error.start]!r}), which is no text; remove it") from error
    return text


def format_of(path: Path) -> str:
    """Return the format that a file's name says: a key of FORMATS; text where it says none."""
    suffix = Path(path.stem).suffix if is_packed(path) else path.suffix
    return suffix.lower() if suffix.lower() in FORMATS else ".txt"


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order; raises AerogelError that names file and line for what cannot be read."""
    return FORMATS[format_of(path)](path)


def _documents(path: Path) -> Iterator[Record]:
    """Documents with form feeds between them."""
    held, line, number = [""], 1, 1
    with open_text(path) as file:
        while chunk := file.read(_CHUNK):
            check(chunk, path, line)
            line += chunk.count("\n")
            first, *others = chunk.split("\f")
            held.append(first)
            for other in others:
                yield Record("".join(held), f"{path} document {number}")
                held, number = [other], number + 1
            if len(held) * _CHUNK > _DOCUMENT + _CHUNK:
                raise AerogelError(f"{path} document {number} has over {_DOCUMENT:,} characters; put form feeds between documents")
    yield Record("".join(held), f"{path} document {number}")


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield Record(parse_json(line, place, "one JSON object a line is expected"), place)


def _json(path: Path) -> Iterator[Record]:
    """Items of an array, also where an object has it under a key; files called .json with an object on each line are common too."""
    with open_text(path) as file:
        text = file.read(_CHUNK)
        if text.lstrip().startswith("["):
            return _numbered(items(path), path)
        text += file.read(_WHOLE + 1 - len(text))
    start = text.lstrip().partition("\n")[0]
    if len(text.strip()) > len(start.strip()) and _is_object(start):
        return _json_lines(path)
    if len(text) > _WHOLE:
        raise AerogelError(f"{path} is an object of over {_WHOLE:,} characters, which is read at once; write it as an array or .jsonl")
    check(text, path, 1)
    if not text.strip():
        return iter(())
    found = parse_json(text, path, "an array of objects or strings is expected")
    return _numbered(_items(found, path), path)


def _numbered(values: Iterable[Any], path: Path) -> Iterator[Record]:
    return (Record(value, f"{path} item {number}") for number, value in enumerate(values, start=1))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _items(found: Any, path: Path) -> list[Any]:
    """The records in a JSON document."""
    if not isinstance(found, dict):
        raise AerogelError(f"{path} holds a JSON {type(found).__name__}; an array of objects or strings is expected")
    if "text" in found or "messages" in found or "conversations" in found:
        return [found] if not _is_array(found.get("text")) else found["text"]
    arrays = [key for key, value in found.items() if _is_array(value)]
    chosen = next((key for key in _ARRAYS if key in arrays), arrays[0] if len(arrays) == 1 else None)
    if chosen is None and arrays:
        raise AerogelError(f"{path} has arrays under {', '.join(map(repr, arrays))}; leave one of them, or write it as .jsonl")
    if chosen is None:
        return [found]
    # The server of the hub gives rows as {"row_idx": 0, "row": {...}}.
    return [item["row"] if isinstance(item, dict) and isinstance(item.get("row"), dict) else item for item in found[chosen]]


def _is_array(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict | str) for item in value)


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a line with the names of the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), _CELL))
    reader = csv.reader(lines(path, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        place = f"{path} line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise AerogelError(f"{place} is not a row of a {format_of(path)} ({error}); write the file anew with quoted cells") from error
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = _header(cells, place)
        elif len(cells) != len(names):
            raise AerogelError(f"{place} has {len(cells)} cells and the header {len(names)}; quote cells that hold the delimiter")
        else:
            yield Record(dict(zip(names, cells, strict=True)), place)


def _header(names: list[str], place: str) -> list[str]:
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise AerogelError(f"{place} names the column {twice[0]!r} twice; rename one")
    return names


def _rows(path: Path, batches: Callable[[Path, BinaryIO], Iterator[Any]]) -> Iterator[Record]:
    """Rows of a file of columns, from what gives its batches by pyarrow."""
    try:
        import pyarrow
    except ImportError as error:
        raise AerogelError(f"reading {path} needs the pyarrow package: pip install 'aerogel[datasets]'") from error
    number = 0
    with _seekable(path) as file:
        try:
            for batch in batches(path, file):
                for start in range(0, batch.num_rows, _ROWS):
                    for row in batch.slice(start, _ROWS).to_pylist():
                        yield Record(row, f"{path} row {number}")
                        number += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            reason, kind = " ".join(str(error).split())[:200], format_of(path)
            raise AerogelError(f"{path} cannot be read from row {number} on as {kind} ({reason}); fetch the file again") from error


def _parquet(path: Path, file: BinaryIO) -> Iterator[Any]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    groups = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    if max(groups, default=0) > _ROW_GROUP:
        raise AerogelError(f"{path} has a row group of {max(groups):,} bytes; write it with smaller ones")
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS):
        number += batch.num_rows
        yield batch
    if number != table.metadata.num_rows:
        raise AerogelError(f"{path} has {number} of the {table.metadata.num_rows} rows that it names; fetch the file again")


def _arrow(path: Path, file: BinaryIO) -> Iterator[Any]:
    from pyarrow import ipc, memory_map

    start, mapped = file.read(len(_ARROW_FILE)), memory_map(file.name)  # where a length beyond the end of the file takes no memory
    if start == _ARROW_FILE:
        table = ipc.open_file(mapped)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = iter(ipc.open_stream(mapped))
    for batch in batches:
        batch.validate(full=True)  # offsets of damaged columns would be read outside of memory
        yield batch


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is read from its end; one that is packed is unpacked into a temporary file."""
    with open_bytes(path) as file:
        if not is_packed(path):
            yield file
            return
        with tempfile.NamedTemporaryFile() as unpacked:
            shutil.copyfileobj(file, unpacked)
            unpacked.flush()
            unpacked.seek(0)
            yield cast(BinaryIO, unpacked)


FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _documents,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": partial(_rows, batches=_parquet),
    ".arrow": partial(_rows, batches=_arrow),
}
"""Readers by the end of the name; a name that ends otherwise is that of a text."""
