"""JSON files that users give: an object is read whole, and anything else is one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aerogel.errors import AerogelError


def parse_json(text: str | bytes, source: object, advice: str) -> Any:
    """Return what JSON text holds; raises AerogelError that names its source and ends with the advice."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise AerogelError(f"{source} is nested too deeply to be read; {advice}") from error
    except ValueError as error:
        raise AerogelError(f"{source} is not JSON ({error}); {advice}") from error


def parse_object(text: str | bytes, source: object, advice: str) -> dict[str, Any]:
    """Return the JSON object that text holds; raises AerogelError like `parse_json`, also for other JSON."""
    found = parse_json(text, source, advice)
    if not isinstance(found, dict):
        raise AerogelError(f"{source} holds a JSON {_KINDS.get(type(found), 'value')}, expected an object; {advice}")
    return found


def read_object(path: Path, advice: str = "fetch or copy the file again") -> dict[str, Any]:
    """Return the JSON object in a file; raises AerogelError that names a file which cannot be read or holds something else."""
    if not path.is_file():  # a pipe would be waited for
        raise AerogelError(f"{path} is {'no regular file' if path.exists() else 'missing'}; {advice}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise AerogelError(f"{path} cannot be read: {error.strerror or error}; {advice}") from error
    return parse_object(text, path, advice)


_KINDS: dict[type, str] = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
