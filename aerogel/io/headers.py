"""Headers of safetensors files and the indices of their shards, read and checked without the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError
from aerogel.io.json_files import parse_object, read_object

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
REPAIR = "fetch or copy the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor in a shard's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """Return the entry of a tensor."""
        return cls(dtype, shape, math.prod(shape) * dtype.itemsize)


def read_index(index: Path) -> dict[str, str]:
    files = read_object(index, REPAIR).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and file for file in files.values()):
        raise AerogelError(f"{index}: not an index of safetensors, it has no weight_map from tensors to files; {REPAIR}")
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise AerogelError(f"{index}: names the file {outside[0]!r}; shards must lie in the index's own folder")
    return dict(sorted(files.items(), key=lambda item: item[1]))


def read_header(file: Path) -> dict[str, Entry]:
    """Parse a safetensors header and check it against the file's size."""
    if not file.is_file():
        raise AerogelError(f"{file}: this shard is missing; {REPAIR}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length or length == 0:
            raise AerogelError(f"{file}: the header does not fit in the file's {size} bytes, it is truncated or not safetensors; {REPAIR}")
        raw = stream.read(length)
    try:
        items = parse_object(raw, f"{file}: the safetensors header is corrupt, it", REPAIR)
        about = items.pop("__metadata__", None)
        if about is not None and not all(isinstance(value, str) for value in about.values()):
            raise ValueError("its __metadata__ holds something else than strings")
        if unknown := sorted({item["dtype"] for item in items.values()} - set(DTYPES)):
            raise AerogelError(f"{file}: holds tensors of dtype {unknown[0]}, which cannot be read; known: {', '.join(DTYPES)}")
        entries = {name: _entry(item) for name, item in items.items()}
        expected = 8 + length + _end_of(items)
    except AerogelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AerogelError(f"{file}: the safetensors header is corrupt ({type(error).__name__}: {error}); {REPAIR}") from error
    if expected != size:
        raise AerogelError(f"{file}: has {size} bytes where its header promises {expected}, so it is truncated or damaged; {REPAIR}")
    return entries


def _entry(item: dict[str, Any]) -> Entry:
    (start, end), shape, dtype = item["data_offsets"], item["shape"], DTYPES[item["dtype"]]
    if not all(type(size) is int and size >= 0 for size in (start, end, *shape)):
        raise ValueError(f"sizes {shape} and offsets {[start, end]} have to be integers of at least 0")
    entry = Entry.of(dtype, tuple(shape))
    if entry.bytes != end - start:
        raise ValueError(
            f"a tensor of shape {shape} and dtype {item['dtype']} takes {entry.bytes} bytes, its offsets {[start, end]} do not"
        )
    return entry


def _end_of(items: dict[str, dict[str, Any]]) -> int:
    """Return where the last tensor ends; raises ValueError unless tensors lie side by side."""
    reached = 0
    for start, end in sorted(item["data_offsets"] for item in items.values()):
        if start != reached:
            raise ValueError(f"tensors overlap or leave a hole at byte {min(start, reached)}")
        reached = end
    return reached
