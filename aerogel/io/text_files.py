"""Text files that are there whole or not at all: a full disk or a kill leaves the one that was there before."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from aerogel.errors import AerogelError, reason_of


def replace_text(path: str | Path, text: str) -> Path:
    """Write a text file in place of one that is there already, and return its path.

    What is no regular file, such as /dev/stdout, is written to as it is. Raises AerogelError that names a file which cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, "utf-8")
            return path
        whole = path.resolve()  # of a link, the file that it points to
        beside = whole.with_name(f".{whole.name}.{uuid4().hex[:12]}.new")
        try:
            beside.write_text(text, "utf-8")
            beside.replace(whole)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise AerogelError(f"{path} could not be written ({reason_of(error)}); free disk space, or give another place") from error
    return path
