"""Checkpoint: the safetensors of a folder, opened lazily; it fills a module's meta tensors and sends them back to meta."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.kernels.malloc import release_pages
from aerogel.layers.slots import Slot, release, slots

# In the order transformers and diffusers look for them: one file wins over an index.
STEMS = ("model", "diffusion_pytorch_model")
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
# Pages of a mapped file count as resident memory until the file is closed, so a long read closes it this often.
_MAPPED_BYTES = 32 << 20
_REPAIR = "fetch or copy the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor in a shard's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


Apart = Callable[[str, Callable[[], tuple[int, ...]]], Mapping[str, "Piece"]]
"""(name, what gives its shape) -> pieces by the names that they answer to; none where the tensor stays whole."""


def _whole(name: str, shape: Callable[[], tuple[int, ...]]) -> Mapping[str, Piece]:
    return {}


@dataclass(frozen=True)
class Piece:
    """A tensor that lies on disk as a part of a larger one, or otherwise: what `take` makes of the larger one's entry `number`."""

    number: int | slice
    """`slice(None)` for all of it."""
    take: Callable[[Tensor], Tensor]


class Checkpoint:
    """Named tensors in the safetensors files of one folder; nothing is read before it is asked for."""

    def __init__(self, folder: Path, files: dict[str, str], rename: Callable[[str], str] = str, apart: Apart = _whole) -> None:
        """`files` says which file of the folder holds each tensor by its name on disk; `rename` gives the name it answers to.

        `apart` gives, for a name that it answers to, the pieces that it answers to instead.
        """
        self.folder = folder
        self._on_disk = {rename(name): name for name in files}
        self._modules = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in self._on_disk.items()}
        self._files = files
        self._headers: dict[str, dict[str, Entry]] = {}
        self._pieces: dict[str, Piece] = {}
        for name, on_disk in list(self._on_disk.items()):
            if pieces := apart(name, lambda name=name: self.shape(name)):  # type: ignore[misc]
                del self._on_disk[name]
                self._on_disk |= dict.fromkeys(pieces, on_disk)
                self._pieces |= pieces

    @classmethod
    def open(cls, folder: str | Path, rename: Callable[[str], str] = str, apart: Apart = _whole) -> Checkpoint:
        """Open the checkpoint in `folder`; raises AerogelError when there is none, or only one in pickle format."""
        folder = Path(folder)
        for stem in STEMS:
            if (folder / f"{stem}.safetensors").is_file():
                file = f"{stem}.safetensors"
                return cls(folder, dict.fromkeys(_read_header(folder / file), file), rename, apart)
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                return cls(folder, read_index(index), rename, apart)
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise AerogelError(
                f"{folder / pickled[0]}: only safetensors are opened, pickle files can run code; "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise AerogelError(f"{folder}: no model.safetensors and no model.safetensors.index.json here; give a folder that has one")

    def verify(self) -> None:
        """Check every file against its header and the index; raises AerogelError that names the bad file."""
        for file in dict.fromkeys(self._files.values()):
            self._header(file)
        for name in self.names():
            self._entry(name)

    def nonfinite(self, names: Iterable[str] | None = None, limits: Collection[str] = ()) -> list[str]:
        """Names of the float tensors that hold a NaN, or an infinity where they are no `limits`; by default among all, read one by one."""
        wanted = [name for name in (self.names() if names is None else names) if self.dtype(name).is_floating_point]
        return [name for name, tensor in self._read(wanted) if not is_sound(tensor, name in limits)]

    def names(self) -> list[str]:
        """Names of all tensors, file by file."""
        return list(self._on_disk)

    def __contains__(self, name: object) -> bool:
        return name in self._on_disk

    def on_disk(self, name: str) -> str:
        """The name that a tensor has on disk; raises AerogelError on a name that is not in the checkpoint."""
        if name not in self._on_disk:
            raise AerogelError(f"{self.folder}: the checkpoint has no tensor {name!r}; it may belong to another model")
        return self._on_disk[name]

    def new_on_disk(self, name: str) -> str | None:
        """The name for a tensor beside those on disk: as the checkpoint calls its module; None when the checkpoint has no such module."""
        module, _, rest = name.rpartition(".")
        while module and module not in self._modules:
            module, _, more = module.rpartition(".")
            rest = f"{more}.{rest}"
        return f"{self._modules[module]}.{rest}" if module else None

    def file(self, name: str) -> Path:
        """The file that holds a tensor; raises AerogelError on a name that is not in the checkpoint."""
        return self.folder / self._files[self.on_disk(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        return self._entry(name).dtype

    def bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes on disk of some tensors, by default of all."""
        return sum(self._entry(name).bytes for name in (self.names() if names is None else names))

    def main_dtype(self) -> torch.dtype:
        """The float dtype of 16 bits or more that most elements are stored in; float32 when there is none."""
        counts: Counter[torch.dtype] = Counter()
        for entry in map(self._entry, self.names()):
            if entry.dtype.is_floating_point and entry.dtype.itemsize >= 2:
                counts[entry.dtype] += entry.bytes // entry.dtype.itemsize
        return counts.most_common(1)[0][0] if counts else torch.float32

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        return next(self._read([name]))[1].clone()

    def materialise(
        self,
        module: nn.Module,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str = "cpu",
        skip: Collection[nn.Module] = (),
    ) -> None:
        """Fill the meta parameters and persistent meta buffers of a module whose full dotted name is `prefix`.

        Floats of 16 bits or more take `dtype`, by default what each meta tensor declares. Submodules in `skip` stay on meta.
        Tensors that several places share are read once and stay shared. Raises AerogelError on a name the checkpoint lacks, a
        wrong shape, or integers where floats belong.
        """
        wanted: dict[str, list[Slot]] = {}
        owners: dict[int, str] = {}
        for slot in slots(module, prefix, skip):
            if slot.tensor.is_meta:
                name = owners.setdefault(id(slot.tensor), slot.name)
                wanted.setdefault(name, []).append(slot)
        # Of the names of a shared tensor the checkpoint may hold any one.
        stored = {next((slot.name for slot in group if slot.name in self), name): group for name, group in wanted.items()}
        for name, tensor in self._read(stored):
            first = stored[name][0]
            self._check_fits(name, first.tensor)
            floats = first.tensor.is_floating_point() and first.tensor.element_size() >= 2
            target = dtype if dtype is not None and floats else first.tensor.dtype
            filled = first.like(tensor.to(device, target, copy=True))
            for slot in stored[name]:
                slot.put(filled)

    def release(self, module: nn.Module) -> None:
        """Send a module's parameters and persistent buffers to meta, and the memory they took back to the system."""
        release(module)

    def _check_fits(self, name: str, slot: Tensor) -> None:
        entry = self._entry(name)
        if entry.shape != tuple(slot.shape):
            found, expected = str(list(entry.shape)), str(list(slot.shape))
        elif entry.dtype.is_floating_point != slot.is_floating_point():
            found, expected = str(entry.dtype), str(slot.dtype)
        else:
            return
        raise AerogelError(f"{self.file(name)}: {name} is {found}, the model expects {expected}; config.json does not fit the weights")

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) file by file; the tensor is a view of the mapped file, good until the next one is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file(name), []).append(name)
        for file, members in by_file.items():
            self._header(file.name)  # a truncated file is named here, before safetensors fails on it
            for batch in self._batches(members):
                with safe_open(file, framework="pt") as handle:
                    for name in batch:
                        piece = self._pieces.get(name)
                        if piece is None:
                            yield name, handle.get_tensor(self.on_disk(name))
                        else:
                            yield name, piece.take(handle.get_slice(self.on_disk(name))[piece.number]).contiguous()
                release_pages()

    def _batches(self, names: list[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for name in names:
            batch.append(name)
            size += self._entry(name).bytes
            if size >= _MAPPED_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _entry(self, name: str) -> Entry:
        file = self.file(name)
        header, on_disk = self._header(file.name), self.on_disk(name)
        if on_disk not in header:
            raise AerogelError(f"{file}: the index says that {on_disk!r} is in this file, and it is not; {_REPAIR}, or the index")
        entry, piece = header[on_disk], self._pieces.get(name)
        if piece is None:
            return entry
        shape = tuple(piece.take(torch.empty(entry.shape, dtype=entry.dtype, device="meta")[piece.number]).shape)
        return Entry(entry.dtype, shape, math.prod(shape) * entry.dtype.itemsize)

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = _read_header(self.folder / file)
        return self._headers[file]


def is_sound(tensor: Tensor, limit: bool = False) -> bool:
    """Return True for numbers without a NaN, and without an infinity unless they are a limit such as that of a clamp."""
    if not tensor.numel():
        return True
    # The extremes are NaN when any number is; they need no memory, and float8 has none of its own.
    extremes = torch.aminmax(tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor)
    return all(math.isfinite(extreme.item()) or (limit and not math.isnan(extreme.item())) for extreme in extremes)


def read_index(index: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise AerogelError(f"{index}: not an index of safetensors ({error}); {_REPAIR}") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise AerogelError(f"{index}: names the file {outside[0]!r}; shards must lie in the index's own folder")
    return dict(sorted(files.items(), key=lambda item: item[1]))


def _read_header(file: Path) -> dict[str, Entry]:
    """Parse a safetensors header and check it against the file's size."""
    if not file.is_file():
        raise AerogelError(f"{file}: this shard is missing; {_REPAIR}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length or length == 0:
            raise AerogelError(f"{file}: the header does not fit in the file's {size} bytes, it is truncated or not safetensors; {_REPAIR}")
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
        raise AerogelError(f"{file}: the safetensors header is corrupt ({type(error).__name__}: {error}); {_REPAIR}") from error
    if expected != size:
        raise AerogelError(f"{file}: has {size} bytes where its header promises {expected}, so it is truncated or damaged; {_REPAIR}")
    return entries


def _entry(item: dict[str, Any]) -> Entry:
    start, end = item["data_offsets"]
    return Entry(DTYPES[item["dtype"]], tuple(item["shape"]), end - start)
