"""Judged candidates of a search in a file beside the output, so that a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aerogel.engine.resume import RUN, begin, write_durably
from aerogel.errors import AerogelError
from aerogel.io.json_files import read_object

_ROWS = "rows.json"


class JudgedRows:
    """Findings about candidates, by their names."""

    def __init__(self, folder: Path | None, resume: bool, made_of: Mapping[str, Any]) -> None:
        """Open the folder, or keep all in memory where there is none.

        Raises AerogelError for one that is there and not to be resumed, or that was started with something else.
        """
        self._folder, self._rows = folder, dict[str, Any]()
        if folder is None:
            return
        if folder.exists() and not (folder / RUN).exists():
            raise AerogelError(f"{folder} is in the way and is no unfinished search; move it, or give another output")
        if folder.exists() and not resume:
            raise AerogelError(f"{folder} holds an unfinished search; add --resume to resume it, or remove the folder to start again")
        begin(folder, made_of)
        if (folder / _ROWS).exists():
            self._rows = read_object(folder / _ROWS, "remove the folder to start again")

    def get(self, name: str) -> dict[str, Any] | None:
        """Return what was found about a candidate; None for one that has not been tried."""
        return self._rows.get(name)

    def add(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Keep what was found about a candidate, and return it as the file has it."""
        self._rows[name] = found
        if self._folder is not None:
            write_durably(self._folder / _ROWS, json.dumps(self._rows))
        return found

    def remove(self) -> None:
        """Remove the folder once the search is saved."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
