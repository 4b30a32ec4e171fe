"""Reading, checking and writing aerogel.json, and checking a folder's weights against the checksums in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from aerogel.errors import AerogelError
from aerogel.io.json_files import read_object
from aerogel.io.older import SCHEMA, upgraded
from aerogel.io.record.schema import Record
from aerogel.io.text_files import replace_text

FILE = "aerogel.json"
Kind = TypeVar("Kind", bound=BaseModel)


def read(folder: str | Path) -> Record:
    """Read the record in an output folder; raises AerogelError that names the file and the field when it is absent or damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise AerogelError(f"{folder} has no {FILE}; give a folder that `aerogel compress` wrote")
    return parse(loaded(path, "aerogel compress"), path).model_copy(update={"folder": Path(folder).resolve().name})


def loaded(path: Path, command: str) -> Any:
    """Return the JSON in a file that this command wrote; raises AerogelError when it cannot be read."""
    return read_object(path, f"expected as `{command}` wrote it")


def parse(content: Any, path: str | Path = FILE) -> Record:
    """Return the record of any release that plain data holds; raises AerogelError that names the field that is wrong."""
    if isinstance(content, Mapping):
        require_known(content, path)
        content = upgraded(content)
    return checked(Record, content, path, "aerogel compress")


def require_known(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise AerogelError when the data has a schema that this release does not know."""
    schema = content.get("schema", 1)
    if not isinstance(schema, int) or schema < 1:
        raise AerogelError(f"{path}: schema: {schema!r} is not a schema number; the file was changed after it was written")
    if schema > SCHEMA:
        raise AerogelError(f"{path} has schema {schema} and this release reads up to {SCHEMA}; upgrade aerogel to open it")


def checked(kind: type[Kind], content: Any, path: str | Path, command: str) -> Kind:
    """Return plain data as this kind of record; raises AerogelError that names the field; `command` wrote it."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise AerogelError(f"{path}: {place}: {first['msg'].lower()}; it was changed after `{command}` wrote it") from error


def write(folder: str | Path, record: Record) -> None:
    """Write the record into a folder, in place of one that is there already, atomically."""
    replace_text(Path(folder) / FILE, json.dumps(record.as_dict(), indent=2, default=str) + "\n")


def verify(folder: str | Path) -> None:
    """Compare a folder's files of tensors with the checksums in its record, if it has one; a component's are in that of its pipeline.

    Raises AerogelError that names a file which is missing or was changed.
    """
    part, folder = Path(folder).absolute(), Path(folder)
    if not (folder / FILE).is_file() and (part.parent / FILE).is_file():
        folder = part.parent
    elif not (folder / FILE).is_file():
        return
    expected = read(folder).checksums
    if folder == part.parent:
        expected = {name: checksum for name, checksum in expected.items() if name.startswith(f"{part.name}/")}
    with ThreadPoolExecutor() as pool:  # hashing runs without the interpreter's lock
        for name, checksum in zip(expected, pool.map(lambda name: checksum_of(Path(folder) / name), expected), strict=True):
            if checksum != expected[name]:
                raise AerogelError(
                    f"{Path(folder) / name} is not what {FILE} has the checksum of: expected {expected[name]}, found {checksum}; "
                    "copy the folder again, or compress again"
                )


def checksum_of(path: Path) -> str:
    """Return `sha256:` of a file's content; raises AerogelError when it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise AerogelError(f"{path} is no regular file, though {FILE} lists it; copy the folder again")
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise AerogelError(f"{path} cannot be read, though {FILE} lists it: {error.strerror or error}") from error
