"""Files of text as streams: regular files only, .gz, .bz2, .xz and .zst unpacked on the way, UTF-8 or what a byte order mark says."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from aerogel.errors import AerogelError

LONGEST = 2**28
"""Characters of one line at most."""
_EXPANDED, _RATIO = 2**26, 100
"""A packed file is refused once it has given more bytes than the first, and more than the second times the bytes that were read of it."""
_MOST_RATIO = 1032
"""No .gz expands to more than so many times its size."""
_PIECE = 2**16
"""Bytes of a packed file that are read at once."""
_DICTIONARY = 2**28
"""Bytes of memory that unpacking an .xz may take at most; that of xz -9 takes a quarter."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and the encodings that they name; that of UTF-32 begins with that of UTF-16."""


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, unpacked where its name ends with one of PACKED.

    Raises AerogelError for what is no regular file or cannot be read, for a damaged packed file and for one that expands without bound.
    """
    if not path.is_file():  # a pipe would be waited for
        raise AerogelError(f"{path} is {'no regular file' if path.exists() else 'missing'}; give a file that can be read from its start")
    try:
        with path.open("rb") as file:
            yield io.BufferedReader(_Unpacked(path, file)) if is_packed(path) else file
    except OSError as error:
        raise AerogelError(f"{path} cannot be read: {error.strerror or error}; give a file that can be read") from error
    except UnicodeDecodeError as error:  # of UTF-16 and UTF-32 only
        raise AerogelError(f"{path} begins like {error.encoding.upper()} and is not; convert it to UTF-8") from error


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file to read its text; bytes that are not UTF-8 come through and are found by `check`."""
    with open_bytes(path) as file:
        start = file.peek(4)[:4]  # type: ignore[attr-defined]  # a BufferedReader
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)


def is_packed(path: Path) -> bool:
    """Return True if the name says that the file is packed."""
    return path.suffix.lower() in PACKED


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a file with their ends; raises AerogelError for one that is not UTF-8 or has no end."""
    with open_text(path, newline) as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise AerogelError(f"{path} line {number} has {LONGEST:,} characters or more; one record a line is expected")
            check(line, path, number)
            yield line


def check(text: str, path: Path, line: int) -> None:
    """Raise AerogelError, with the line, where text that begins in that line was not UTF-8, or holds a zero byte as no text does."""
    if (place := text.find("\0")) >= 0:
        raise AerogelError(
            f"{path} line {line + text.count(chr(10), 0, place)} holds a zero byte, so it is no text; fetch or copy the file again"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = line + text.count("\n", 0, error.start)
        byte = ord(text[error.start]) - 0xDC00
        raise AerogelError(
            f"{path} line {at} is not UTF-8 text (byte 0x{byte:02x}); convert it, for example from Latin-1: iconv -f latin1 -t utf-8"
        ) from error


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file as far as they are asked for."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._given = path, file, 0
        if path.suffix.lower() == ".gz":
            self._refuse_bomb(*self._named(file))
        self._stream = PACKED[path.suffix.lower()](path, file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            found = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk; libraries that unpack give none
                raise
            ending, reason = self._path.suffix.lower(), " ".join(str(error).split())
            raise AerogelError(f"{self._path} is damaged or no {ending} ({reason}); fetch or copy the file again") from error
        self._given += len(found)
        self._refuse_bomb(self._given, self._file.tell())
        buffer[: len(found)] = found
        return len(found)

    def _refuse_bomb(self, expanded: int, packed: int) -> None:
        if expanded > max(_EXPANDED, _RATIO * packed):
            raise AerogelError(
                f"{self._path} expands to more than {_RATIO} times its size, or is cut short; fetch it again, or unpack it if that is right"
            )

    @staticmethod
    def _named(file: BinaryIO) -> tuple[int, int]:
        """The bytes that a .gz names at its end, which a bomb is told by before it is read, and its own; others name what they like."""
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - 4, 0))
        named = int.from_bytes(file.read(4), "little")
        file.seek(0)
        return (named if named <= _MOST_RATIO * size else 0, size)


class _Streams:
    """The bytes of streams that follow each other in a file, from what makes a decompressor of the standard library."""

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make, self._stream = file, make, make()

    def read(self, size: int) -> bytes:
        """Return some of the bytes, at most so many; none at the end."""
        while True:
            packed = b""
            if self._stream.eof:
                if not (packed := self._stream.unused_data or self._file.read(_PIECE)):
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input and not (packed := self._file.read(_PIECE)):
                raise EOFError("it is cut short")
            if found := self._stream.decompress(packed, size):
                return bytes(found)


def _zstandard(path: Path, file: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise AerogelError(f"reading {path} needs the pyarrow package: pip install 'aerogel[datasets]'; or unpack it") from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


PACKED: dict[str, Callable[[Path, BinaryIO], Any]] = {
    ".gz": lambda path, file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda path, file: _Streams(file, bz2.BZ2Decompressor),
    ".xz": lambda path, file: _Streams(file, partial(lzma.LZMADecompressor, memlimit=_DICTIONARY)),
    ".zst": _zstandard,
}
"""Functions that give the bytes of a packed file, by the end of its name."""
