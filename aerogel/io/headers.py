"""Headers of safetensors files and the indices of their shards, read and checked without the tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError

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
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise AerogelError(f"{index}: not an index of safetensors ({error}); {REPAIR}") from error
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
        items = {name: item for name, item in json.loads(raw).items() if name != "__metadata__"}
        if unknown := sorted({item["dtype"] for item in items.values()} - set(DTYPES)):
            raise AerogelError(f"{file}: holds tensors of dtype {unknown[0]}, which cannot be read; known: {', '.join(DTYPES)}")
        entries = {name: _entry(item) for name, item in items.items()}
        expected = 8 + length + max((item["data_offsets"][1] for item in items.values()), default=0)
    except AerogelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AerogelError(f"{file}: the safetensors header is corrupt ({type(error).__name__}: {error}); {REPAIR}") from error
    if expected != size:
        raise AerogelError(f"{file}: has {size} bytes where its header promises {expected}, so it is truncated or damaged; {REPAIR}")
    return entries


def _entry(item: dict[str, Any]) -> Entry:
    start, end = item["data_offsets"]
    return Entry(DTYPES[item["dtype"]], tuple(item["shape"]), end - start)
