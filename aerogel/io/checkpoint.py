"""Checkpoint: the safetensors of a folder, opened lazily; it fills a module's meta tensors and sends them back to meta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aerogel.errors import AerogelError, reason_of
from aerogel.io.headers import REPAIR, Entry, read_header, read_index
from aerogel.kernels.malloc import release_pages
from aerogel.layers.slots import Slot, release, slots
from aerogel.numerics.ranges import is_sound, require_range

# In the order transformers and diffusers look for them: one file wins over an index.
STEMS = ("model", "diffusion_pytorch_model")
# Pages of a mapped file count as resident memory until the file is closed, so a long read closes it this often.
_MAPPED_BYTES = 32 << 20
_ONE_NUMBER: frozenset[tuple[int, ...]] = frozenset({(), (1,)})


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


@dataclass(frozen=True)
class Dequantized:
    """A tensor that lies on disk as others, such as quantized values and their scale; the checkpoint answers to it only."""

    values: str
    """Name on disk of the quantized values."""
    parts: tuple[str, ...]
    """Names on disk of their scales and of whatever else they need, which may be in other files."""
    entry: Entry
    """Description of the tensor."""
    make: Callable[..., Tensor]
    """(values, *parts) -> the float tensor; one entry of the values, with its parts, gives the same entry of it."""
    entry_parts: tuple[str, ...]
    """Those of the parts of which each entry of the values has its own; the others are for all."""
    format: str
    """Format of the quantized values in words; empty where nothing is quantized."""
    descriptions: tuple[str, ...] = ()
    """Names on disk of tensors that only say how the values are stored, and are not needed any more."""
    of_linear: bool = False
    """True where it is the weight_OI of a linear layer, also where float checkpoints of the model have it otherwise, as Conv1D does."""


@dataclass(frozen=True)
class OnDisk:
    """Tensors of a folder by their names on disk."""

    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    """Gives the values of a tensor: for small ones that say how others are stored."""


Dequantize = Callable[[OnDisk], Mapping[str, Dequantized | None]]
"""Tensors on disk -> float tensors by the names that float checkpoints have for them; None for a tensor that nobody reads."""


def together(*found: Dequantize | None) -> Dequantize | None:
    """Return what does all of these, each for other tensors; None where there is nothing to do."""
    each = [one for one in found if one is not None]
    return (lambda on_disk: {name: made for one in each for name, made in one(on_disk).items()}) if each else None


class Checkpoint:
    """Named tensors in the safetensors files of one folder; nothing is read before it is asked for."""

    def __init__(
        self,
        folder: Path,
        files: dict[str, str],
        rename: Callable[[str], str] = str,
        apart: Apart = _whole,
        dequantize: Dequantize | None = None,
    ) -> None:
        """`files` says which file of the folder holds each tensor by its name on disk; `rename` gives the name it answers to.

        `apart` gives, for a name that it answers to, the pieces that it answers to instead. `dequantize` says which tensors on disk make
        float tensors; it sees the headers of all files.
        """
        self.folder = folder
        self._files = files
        self._headers: dict[str, dict[str, Entry]] = {}
        self._dequantized: dict[str, Dequantized] = {}
        self._unread: tuple[str, ...] = ()
        floats = list(files) if dequantize is None else self._as_floats(dequantize)
        self._on_disk = {rename(name): name for name in floats}
        self._modules = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in self._on_disk.items()}
        self._pieces: dict[str, Piece] = {}
        for name, on_disk in list(self._on_disk.items()):
            if on_disk in self._dequantized and self._dequantized[on_disk].of_linear:
                continue
            if pieces := apart(name, lambda name=name: self.shape(name)):  # type: ignore[misc]
                del self._on_disk[name]
                self._on_disk |= dict.fromkeys(pieces, on_disk)
                self._pieces |= pieces

    def _as_floats(self, dequantize: Dequantize) -> list[str]:
        """Names of the tensors as a float checkpoint has them, file by file."""
        entries = {name: self._stored(name) for name in self._files}
        with _Shards(self.folder, self._files) as shards:
            found = dequantize(OnDisk(entries, lambda name: shards.read(name, slice(None)).clone()))
        self._dequantized = {name: made for name, made in found.items() if made is not None}
        for name, made in self._dequantized.items():
            if name in entries and name not in (made.values, *made.parts):
                raise AerogelError(f"{self.folder}: it has both {name} and {made.values}, which are one weight; get the files of one model")
        named = {made.values: name for name, made in self._dequantized.items()}
        self._unread = tuple(name for name, made in found.items() if made is None)
        gone = {*self._unread, *(part for made in self._dequantized.values() for part in (*made.parts, *made.descriptions))}
        return [named.get(name, name) for name in self._files if name not in gone]

    @classmethod
    def open(
        cls, folder: str | Path, rename: Callable[[str], str] = str, apart: Apart = _whole, dequantize: Dequantize | None = None
    ) -> Checkpoint:
        """Open the checkpoint in `folder`; raises AerogelError when there is none, or only one in pickle format."""
        folder = Path(folder)
        for stem in STEMS:
            if (folder / f"{stem}.safetensors").is_file():
                file = f"{stem}.safetensors"
                return cls(folder, dict.fromkeys(read_header(folder / file), file), rename, apart, dequantize)
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                return cls(folder, read_index(index), rename, apart, dequantize)
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
        for name in self._files:
            self._stored(name)

    def nonfinite(
        self, names: Iterable[str] | None = None, limits: Collection[str] = (), dtypes: Mapping[str, torch.dtype] | None = None
    ) -> list[str]:
        """Names of the float tensors that hold a NaN, or an infinity where they are no `limits`; by default among all, read one by one.

        Raises AerogelError for one with finite numbers that the dtype in `dtypes` which it is cast to does not hold.
        """
        wanted, bad = [name for name in (self.names() if names is None else names) if self.dtype(name).is_floating_point], []
        for name, tensor in self._read(wanted):
            if not is_sound(tensor, name in limits):
                bad.append(name)
            elif dtypes is not None and name in dtypes:
                require_range(f"{self.file(name)}: {name}", tensor, dtypes[name])
        return bad

    def names(self) -> list[str]:
        """Names of all tensors, file by file."""
        return list(self._on_disk)

    def dequantized(self) -> dict[str, Dequantized]:
        """The float tensors that are made of quantized ones, by their names on disk."""
        return dict(self._dequantized)

    def unread(self) -> tuple[str, ...]:
        """Names on disk of the tensors that the checkpoint does not answer to, because they only served the quantized ones."""
        return self._unread

    def is_dequantized(self, name: str) -> bool:
        """Return True for a float tensor that is made of quantized ones."""
        return name in self and self.on_disk(name) in self._dequantized

    def leave_out(self, name: str) -> None:
        """Stop answering to a tensor."""
        del self._on_disk[name]

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
        on_disk = self.on_disk(name)
        made = self._dequantized.get(on_disk)
        return self.folder / self._files[on_disk if made is None else made.values]

    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return [self.folder / file for file in dict.fromkeys(self._files.values())]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header; of a dequantized one that of the floats."""
        return self._entry(name).dtype

    def bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of some tensors, those of dequantized ones as floats; by default what all take on disk."""
        return sum(self._stored(name).bytes for name in self._files) if names is None else sum(self._entry(name).bytes for name in names)

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
        wrong shape, integers where floats belong, or a number that the dtype does not hold. A single number may be a scalar or a vector
        of one: both are in use for scales.
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
            if isinstance(first.tensor, nn.Parameter):  # buffers may hold limits
                require_range(f"{self.file(name)}: {name}", tensor, target)
            filled = first.like(tensor.to(device, target, copy=True).reshape(first.tensor.shape))
            for slot in stored[name]:
                slot.put(filled)

    def release(self, module: nn.Module) -> None:
        """Send a module's parameters and persistent buffers to meta, and the memory they took back to the system."""
        release(module)

    def check(self, module: nn.Module) -> None:
        """Raise AerogelError where a tensor does not fit its place in a module, as `materialise` does, from the headers alone."""
        for slot in slots(module):
            if slot.name in self:
                self._check_fits(slot.name, slot.tensor)

    def _check_fits(self, name: str, slot: Tensor) -> None:
        entry = self._entry(name)
        advice = "config.json does not fit the weights"
        if entry.shape != tuple(slot.shape) and not {entry.shape, tuple(slot.shape)} <= _ONE_NUMBER:
            found, expected = str(list(entry.shape)), str(list(slot.shape))
        elif entry.dtype != slot.dtype and (is_float8(entry.dtype) or is_float8(slot.dtype)):
            # Wider floats are not rounded to 8 bits on the way either.
            found, expected = str(entry.dtype), str(slot.dtype)
            if is_float8(entry.dtype):
                advice = "config.json says nothing of its scale; get the config.json that belongs to it, or the model in 16 bits"
        elif entry.dtype.is_floating_point != slot.is_floating_point():
            found, expected = str(entry.dtype), str(slot.dtype)
        else:
            return
        raise AerogelError(f"{self.file(name)}: {name} is {found}, the model expects {expected}; {advice}")

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) file by file; the tensor is a view of the mapped file, good until the next one is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file(name), []).append(name)
        for file, members in by_file.items():
            self._header(file.name)  # a truncated file is named here, before safetensors fails on it
            for batch in self._batches(members):
                with _Shards(self.folder, self._files) as shards:
                    for name in batch:
                        piece = self._pieces.get(name)
                        if piece is None:
                            yield name, self._read_part(shards, self.on_disk(name), slice(None))
                        else:
                            yield name, piece.take(self._read_part(shards, self.on_disk(name), piece.number)).contiguous()
                release_pages()

    def _read_part(self, shards: _Shards, on_disk: str, number: int | slice) -> Tensor:
        made = self._dequantized.get(on_disk)
        if made is None:
            return shards.read(on_disk, number)
        parts = (shards.read(part, number if part in made.entry_parts else slice(None)) for part in made.parts)
        return made.make(shards.read(made.values, number), *parts)

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
        on_disk, piece = self.on_disk(name), self._pieces.get(name)
        made = self._dequantized.get(on_disk)
        entry = self._stored(on_disk) if made is None else made.entry
        if piece is None:
            return entry
        shape = tuple(piece.take(torch.empty(entry.shape, dtype=entry.dtype, device="meta")[piece.number]).shape)
        return Entry.of(entry.dtype, shape)

    def _stored(self, on_disk: str) -> Entry:
        file = self._files[on_disk]
        header = self._header(file)
        if on_disk not in header:
            raise AerogelError(
                f"{self.folder / file}: the index says that {on_disk!r} is in this file, and it is not; {REPAIR}, or the index"
            )
        return header[on_disk]

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]


class _Shards:
    """Files of a folder, each opened when a tensor of it is asked for, all closed together."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self._folder, self._files = folder, files
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, on_disk: str, number: int | slice) -> Tensor:
        """Return a tensor, or one entry of it."""
        file = self._files[on_disk]
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            except SafetensorError as error:
                raise AerogelError(f"{self._folder / file} cannot be read ({reason_of(error)}); {REPAIR}") from error
        found: Tensor = self._open[file].get_slice(on_disk)[number] if isinstance(number, int) else self._open[file].get_tensor(on_disk)
        return found


def is_float8(dtype: torch.dtype) -> bool:
    """Return True for floats of 8 bits, which mean nothing without a scale."""
    return dtype.is_floating_point and dtype.itemsize == 1
