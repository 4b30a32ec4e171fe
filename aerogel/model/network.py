"""A network: a module together with its family, where it came from and what prepares its inputs."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.placement import Placement

if TYPE_CHECKING:
    from aerogel.io.checkpoint import Checkpoint


@dataclass(eq=False)
class Network:
    """A model with its structure, on which every method works."""

    module: nn.Module
    family: Family
    origin: Path | None = None
    """The folder it was opened from, or None for a live module."""
    processor: Any = None
    """Tokenizer or processor, when it has one."""
    checkpoint: Checkpoint | None = None
    """The checkpoint from which weights that are not resident are read; None when all are resident."""
    stored_dtype: torch.dtype | None = None
    """The dtype that float weights have on disk; None means that of the module."""

    placed: Placement | None = None
    """Where it computes and where its weights rest; None means where its weights are."""
    pruned: set[str] = field(default_factory=set)
    """Full names of the layers whose zeros every later step keeps."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Facts that a method of the whole model has noted for the report."""
    teacher: Network | None = None
    """The network before any step of a run, while one is under way that asked for it."""

    @property
    def config(self) -> Any:
        """The module's own configuration, or None."""
        return getattr(self.module, "config", None)

    @property
    def placement(self) -> Placement:
        """The devices that it computes on and rests on."""
        return self.placed or Placement.of(self.module)

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.placement.device

    def on_device(self) -> AbstractContextManager[None]:
        """Hold all its weights on the computing device for a while; they are there anyway unless it was given another than theirs."""
        return self.placement.resident(self.module)

    def glue_on_device(self) -> AbstractContextManager[None]:
        """Hold what is around the blocks on the computing device for a while."""
        return self.placement.glue_resident(self.module, list(self.blocks().values()))

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks of every tower by full dotted name, in list order."""
        return {name: module for tower in self.family.towers for name, module in self.named(*tower.globs).items()}

    def named(self, *globs: str) -> dict[str, nn.Module]:
        """The modules that one of the globs names, by full dotted name in the module's own order; `*` stands for one part of a name."""
        patterns = [re.compile(_one_part(glob)) for glob in globs]
        return {name: module for name, module in self.module.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)}

    def note(self, name: str, block: str, **facts: Any) -> None:
        """Note facts about a part of the model, which is in this block, for the report: numbers and short texts."""
        self.notes.append({"block": block, "name": name, **facts})

    def take_notes(self) -> list[dict[str, Any]]:
        """Return the notes so far and start anew."""
        notes, self.notes = self.notes, []
        return notes

    def run(self, call: Call) -> Any:
        """One forward of the whole network, without gradients; the call comes to the computing device, and its output stays there."""
        args, kwargs = self.placement.bring((call.args, call.kwargs))
        with torch.no_grad():
            return self.module(*args, **kwargs)


def _one_part(glob: str) -> str:
    """A glob in which `*` stands for one part of a dotted name, as a regular expression."""
    return r"[^.]+".join(re.escape(part) for part in glob.split("*"))
