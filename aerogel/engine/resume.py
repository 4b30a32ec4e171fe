"""The progress folder: what is finished lies on disk, so that memory holds one block and a killed run goes on where it stopped.

out.partial/run.json                      what the run is made of; a run goes on only with the same
out.partial/stage-0/walk.json, activations/      the walk's own state; of several processes each has a folder process-N with its own
out.partial/stage-0/blocks/NAME/          model.safetensors (the finished block), block.json (its structure and journal),
                                          parameters.safetensors (those of policies inside the block, as they were learned)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aerogel.errors import AerogelError, reason_of
from aerogel.io import quantization_schema, quantized, save
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.headers import read_header
from aerogel.io.json_files import read_object
from aerogel.io.record.schema import JournalLine
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.processes import ALONE, Processes

JOURNAL = "block.json"
PARAMETERS = "parameters.safetensors"
RUN = "run.json"
_ANEW = "remove the progress folder to start again"


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of a checkpoint: `sha256:` over its files and config.json."""
    digest = hashlib.sha256()
    config = checkpoint.folder / "config.json"
    for path in sorted({*checkpoint.files()} | ({config} if config.exists() else set())):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Turn a failing disk into AerogelError that says how to go on; what is finished stays in the progress folder."""
    try:
        yield
    except save.DiskError as error:
        raise AerogelError(f"{error}; {folder} keeps the finished blocks: add --resume to continue once that is fixed") from error
    except (OSError, SafetensorError) as error:
        at = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        raise AerogelError(
            f"the run stopped ({at}{reason_of(error)}); {folder} keeps the finished blocks: add --resume to continue once that is fixed"
        ) from error


class Progress:
    """One run's folder; brings blocks in for their visit and lets them go."""

    def __init__(self, folder: Path, network: Network, source: Checkpoint, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.processes = processes
        self.network = network
        self._source = source
        self.homes: dict[str, Checkpoint] = {}
        """Files with the newest tensors of each finished block."""

    @classmethod
    def open(
        cls, folder: Path, network: Network, source: Checkpoint, fingerprint: Mapping[str, Any], processes: Processes = ALONE
    ) -> Progress:
        """Start a run, or resume the one in the folder; raises AerogelError when that one is made of something else.

        `source` has the network's weights; `fingerprint` is JSON that says part by part what the run is made of. Of several processes the
        first one writes what all have in common, and each the activations of its own calls.
        """
        processes.of_first(lambda: begin(folder, fingerprint))
        return cls(folder, network, source, processes)

    def stage(self, number: int) -> Stage:
        """The part of the folder that belongs to one stage of the recipe."""
        return Stage(self, self.folder / f"stage-{number}", self.processes)

    def enter(self, name: str) -> None:
        """Make the newest weights of a block resident."""
        home = self.homes.get(name, self._source)
        home.materialise(self.network.module.get_submodule(name), name, device=self.network.placement.device)

    def release(self, name: str) -> None:
        """Let the weights of a block go; they lie in this folder or in the source."""
        self._source.release(self.network.module.get_submodule(name))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the network by name, one in memory at a time: from memory, finished blocks, or the source."""
        seen: set[int] = set()
        for name, tensor in self.network.module.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                yield name, self._home_of(name).tensor(name)
            elif id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()

    def _home_of(self, name: str) -> Checkpoint:
        for block, home in self.homes.items():
            if name.startswith(f"{block}."):
                return home
        return self._source


class FinishedBlock(NamedTuple):
    """Record of a finished block, stored beside its tensors."""

    block: str
    notes: list[dict[str, Any]]
    """Lines that methods write for the report."""
    parameters: dict[str, Tensor]
    """Parameters of policies inside the block, as they were learned, by full name."""


class Stage:
    """Finished blocks of one stage of a recipe."""

    def __init__(self, progress: Progress, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self._progress = progress
        self._processes = processes

    @property
    def walk(self) -> Path:
        """The folder of this process's walk: its position and its activations."""
        return self.folder if self._processes.alone else self.folder / f"process-{self._processes.rank}"

    def commit(self, block: Block, apart: bool = False) -> None:
        """Store a finished block durably, with what its methods noted and learned of parameters of policies.

        Processes that do blocks `apart` each store their own. Else all have done this one, the first stores it, and none goes on before:
        each has the outputs of the block by then, so that all can resume after it.
        """
        folder = self._folder_of(block.name)
        if apart or self._processes.first:
            self._store(block, folder)
        if not apart:
            self._processes.wait()
        self._progress.homes[block.name] = Checkpoint.open(folder)

    def _store(self, block: Block, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        on_host = block.network.placement.take_back(dict(block.module.state_dict()))
        tensors = {block.full_name(name): tensor.contiguous() for name, tensor in on_host.items()}
        _save(tensors, folder / "model.safetensors")
        if block.parameters:
            values = block.network.placement.take_back(block.parameters)
            _save({name: value.detach().contiguous() for name, value in values.items()}, folder / PARAMETERS)
        pruned = sorted(name for name in block.network.pruned if name.startswith(f"{block.name}."))
        write_durably(folder / JOURNAL, json.dumps({"structure": quantized.describe(block.module), "pruned": pruned, "notes": block.notes}))

    def committed(self) -> set[str]:
        """Names of the blocks that are put away."""
        return self._processes.of_first(lambda: {path.parent.name for path in self.folder.glob(f"blocks/*/{JOURNAL}")})

    def restore(self, names: Iterable[str]) -> list[FinishedBlock]:
        """Rebuild the structure of blocks that an earlier process finished, and return what else it stored of them."""
        found: list[FinishedBlock] = []
        for name in names:
            folder = self._folder_of(name)
            state = _block_in(folder / JOURNAL)
            if state.structure is not None:
                quantized.attach(self._progress.network.module.get_submodule(name), state.structure)
            self._progress.network.pruned.update(state.pruned)
            self._progress.homes[name] = home = Checkpoint.open(folder)
            home.check(self._progress.network.module)
            parameters = load_file(folder / PARAMETERS) if (folder / PARAMETERS).exists() else {}
            found.append(FinishedBlock(name, [note.as_dict() for note in state.notes], parameters))
        return found

    def _folder_of(self, name: str) -> Path:
        return self.folder / "blocks" / name


class _Block(BaseModel):
    """Content of block.json."""

    structure: dict[str, Any] | None
    pruned: list[str] = []
    notes: list[JournalLine]


def _block_in(path: Path) -> _Block:
    try:
        found = _Block.model_validate(read_object(path, _ANEW))
        if found.structure is not None:
            quantization_schema.check(found.structure)
    except (ValidationError, AerogelError) as error:
        raise AerogelError(f"{path} is damaged; {_ANEW}") from error
    return found


def _require_readable(folder: Path) -> None:
    """Raise AerogelError for a file of a progress folder that is a pipe, a broken link or the like, or has another header than its size."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() and (path.suffix in (".json", ".safetensors") or not path.is_dir()):
            raise AerogelError(f"{path} is no regular file; {_ANEW}")
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            read_object(path, _ANEW)


def begin(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Make a progress folder, or check one that is there; raises AerogelError for one that was started with something else."""
    path = folder / RUN
    if path.exists():
        _require_readable(folder)
        _require_same(folder, read_object(path, _ANEW), json.loads(json.dumps(fingerprint)))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(fingerprint))


def _require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for part in {**now, **before}:
        if before.get(part) != now.get(part):
            raise AerogelError(
                f"{folder} was started with another {part} ({_brief(before.get(part))}, now {_brief(now.get(part))}); "
                f"give the same {part} to resume, or remove the folder to start again"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    beside = path.with_name(f"{path.name}.new")
    save_file(tensors, beside)
    replace_durably(beside, path)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    replace_durably(beside, path)


def replace_durably(beside: Path, path: Path) -> None:
    """Make a written file durable under its final name."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
