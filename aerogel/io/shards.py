"""Safetensors files written tensor by tensor: a stream of any length in bounded memory, split into shards, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.headers import DTYPES
from aerogel.numerics.packing import raw_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 << 20


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], stem: str = "model", max_shard_size: int = 5_000_000_000
) -> dict[str, str]:
    """Write tensors as they come and return {file name: "sha256:..."}; more than one file gets an index beside it.

    One tensor is in memory at a time. `max_shard_size` is in bytes; a larger tensor gets a file of its own. Raises AerogelError when
    a name comes twice or nothing comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[list[_Entry], str]] = []
    seen: set[str] = set()
    with _Spool(folder / f"{stem}.spool") as spool:
        for name, tensor in tensors:
            if name in seen:
                raise AerogelError(f"{folder}: the tensor {name!r} was given twice; every name is saved once")
            seen.add(name)
            if spool.entries and spool.size + tensor.nbytes > max_shard_size:
                shards.append(spool.flush(_shard(folder, stem, len(shards))))
            spool.add(name, tensor)
        if not seen:
            raise AerogelError(f"{folder}: there are no tensors to save")
        shards.append(spool.flush(_shard(folder, stem, len(shards))))
    return _name_shards(folder, stem, shards)


class _Spool:
    """The data of one shard in order of arrival; its header can be written only when the last tensor is known."""

    def __init__(self, path: Path) -> None:
        self.entries: list[_Entry] = []
        self.size = 0
        self._file = path.open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        Path(self._file.name).unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        flat = raw_bytes(tensor).cpu()
        self.entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), self.size, flat.numel()))
        self._file.write(flat.numpy().data)
        self.size += flat.numel()

    def flush(self, shard: Path) -> tuple[list[_Entry], str]:
        """Write what there is into a shard file and start anew; returns the shard's entries and its checksum."""
        # Wide dtypes come first, so that every tensor lies aligned to its own size.
        ordered = sorted(self.entries, key=lambda entry: -entry.dtype.itemsize)
        digest = hashlib.sha256()
        with shard.open("wb") as out:
            for chunk in self._contents(ordered):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        self.entries, self.size = [], 0
        self._file.seek(0)
        self._file.truncate()
        return ordered, f"sha256:{digest.hexdigest()}"

    def _contents(self, ordered: list[_Entry]) -> Iterable[bytes]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for entry in ordered:
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [place, place + entry.size]}
            place += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for entry in ordered:
            self._file.seek(entry.start)
            left = entry.size
            while left:
                chunk = self._file.read(min(left, _CHUNK))
                left -= len(chunk)
                yield chunk


def _shard(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}-{number + 1:05d}.safetensors"


def _name_shards(folder: Path, stem: str, shards: list[tuple[list[_Entry], str]]) -> dict[str, str]:
    """Give the files their final names, which say how many there are, and write the index when there are several."""
    files = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    files = files if len(files) > 1 else [f"{stem}.safetensors"]
    for number, file in enumerate(files):
        _shard(folder, stem, number).rename(folder / file)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size for entries, _ in shards for entry in entries)},
            "weight_map": {entry.name: file for file, (entries, _) in zip(files, shards, strict=True) for entry in entries},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {file: checksum for file, (_, checksum) in zip(files, shards, strict=True)}
