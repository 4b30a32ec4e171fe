"""Arrays in .json files, item by item, so that memory holds one item and not the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aerogel.data.unpacking import LONGEST, check, open_text
from aerogel.errors import AerogelError

_CHUNK = 2**20
"""Characters that are read at once."""
_ESCAPE = 16
"""Characters before the end of what was read in which a word, a number or an escape may be cut in two."""
_SPACE = " \t\r\n"


def items(path: Path) -> Iterator[Any]:
    """Yield the items of a file that is one JSON array.

    Raises AerogelError that names the item for what is not JSON, is nested too deeply or has no end.
    """
    with open_text(path) as file:
        window = _Window(path, file.read)
        window.expect("[")
        while window.next() != "]":
            if window.number:
                window.expect(",")
            yield window.item()
        window.expect("]")
        if window.next():
            raise window.wrong("more follows behind the array")


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, path: Path, read: Any) -> None:
        self.number = 0
        """Items that were given."""
        self._path, self._read, self._decoder = path, read, json.JSONDecoder()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next(self) -> str:
        """Return the next character that is no space, and nothing at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more(_CHUNK):
                return self._text[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Step over a character; raises AerogelError where there is another."""
        if (found := self.next()) != character:
            raise self.wrong(f"{character!r} is expected, and there is {found!r}" if found else "the file ends in the array")
        self._at += 1

    def item(self) -> Any:
        """Return the next item, which is read as far as it goes."""
        self.next()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise AerogelError(f"{self._path} item {self.number + 1} is nested too deeply to be read") from error
            except ValueError as error:
                if not self._is_cut(error) or not self._more(max(_CHUNK, len(self._text) - self._at)):
                    raise self.wrong(getattr(error, "msg", str(error))) from error
                continue
            is_cut = isinstance(found, int | float) and end >= len(self._text) - _ESCAPE  # a number may go on
            if not is_cut or not self._more(_CHUNK):
                self._at, self.number = end, self.number + 1
                return found

    def wrong(self, reason: str) -> AerogelError:
        """Return the error of what stands here."""
        return AerogelError(f"{self._path} item {self.number + 1} is not JSON ({reason}); an array of objects or strings is expected")

    def _is_cut(self, error: ValueError) -> bool:
        """Return True where an error may be for want of text that was not read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _ESCAPE

    def _more(self, count: int) -> bool:
        """Read on; False at the end of the file. What was parsed is forgotten."""
        if self._ended:
            return False
        if len(self._text) - self._at > LONGEST:
            raise AerogelError(f"{self._path} item {self.number + 1} has over {LONGEST:,} characters; write smaller records")
        if not (chunk := self._read(count)):
            self._ended = True
            return False
        check(chunk, self._path, self._line)
        self._line += chunk.count("\n")
        self._text, self._at = self._text[self._at :] + chunk, 0
        return True
