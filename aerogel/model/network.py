"""A network: a module together with its family, where it came from and what prepares its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.family import Family, TimePath
from aerogel.model.match import matches
from aerogel.model.placement import Placement
from aerogel.model.structure.coupled import CoupledChannels, coupled_by_block
from aerogel.model.structure.edges import BlockEdges, edges_by_block
from aerogel.model.structure.examples import Example, examples_of, usable
from aerogel.model.structure.filters import filters_by_block
from aerogel.model.structure.fused_sets import FusedSet, fused_sets_of
from aerogel.model.structure.moe import gates_of
from aerogel.model.structure.probe import Refused
from aerogel.model.structure.residual import Residual, residual_of
from aerogel.model.structure.time_layers import time_path_of
from aerogel.model.structure.towers import Tower, towers_of

if TYPE_CHECKING:
    from aerogel.io.checkpoint import Checkpoint
    from aerogel.io.names import Names
    from aerogel.io.source import ModelSource
    from aerogel.io.unbuilt import Unbuilt


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
    source: ModelSource | None = None
    """Source it was opened from and how, to open it again; None for a live module."""
    names: Names | None = None
    """Conversions between the names of its tensors on disk and in memory; None where they are the same."""
    unbuilt: Unbuilt | None = None
    """Tensors of its checkpoint that its class has no module for, which are saved as they are."""
    dequantized: str | None = None
    """A line on how its weights were quantized on disk where they were opened as floats."""
    examples: Sequence[Call] = ()
    """Calls that the structure is discovered with where inputs made up from the configuration do not run."""

    placed: Placement | None = None
    """Where it computes and where its weights rest; None means where its weights are."""
    pruned: set[str] = field(default_factory=set)
    """Full names of the layers whose zeros every later step keeps."""
    sparsities: dict[str, float] = field(default_factory=dict)
    """Shares of zeros that an allocation step gave layers, by full name."""
    narrowings: dict[Any, Any] = field(default_factory=dict)
    """Ways to remove coupled channels that were looked for, by what was asked."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Facts that a method of the whole model has noted for the report."""
    teacher: Network | None = None
    """The network before any step of a run, while one is under way that asked for it."""

    def in_memory(self, name: str) -> str:
        """Return the name in memory of a tensor or module by its name on disk."""
        return name if self.names is None else self.names.in_memory(name)

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

    @cached_property
    def towers(self) -> tuple[Tower, ...]:
        """The lists of blocks, found by watching the network run; later changes of its layers do not move them."""
        return towers_of(self.module, self._examples)

    def discover(self, calls: Sequence[Call] = ()) -> None:
        """Find the blocks now, while nothing changes what runs; with calls where inputs made up from the configuration did not run."""
        if calls and self.needs_example:
            self.examples = calls
            self.forget_structure()
            for name in ("_examples", "towers"):
                self.__dict__.pop(name, None)
        _ = self.towers

    @property
    def needs_example(self) -> bool:
        """True where inputs made up from the configuration do not run the whole network."""
        return all(example.part for example in self._examples)

    @cached_property
    def _examples(self) -> list[Example]:
        found = examples_of(self.module)
        return (usable(self.module, self.examples[0]) if self.examples else []) + found

    @cached_property
    def edges(self) -> dict[str, BlockEdges]:
        """The edges of each block and why other layers are no sources, found with random weights on one block of each kind."""
        return edges_by_block(self.module, tuple(self.blocks()), self._examples)

    @cached_property
    def coupled(self) -> dict[str, tuple[CoupledChannels, ...]]:
        """The FFN channels, attention heads and filters that can leave each block, found on one block of each kind."""
        inner = coupled_by_block(self.module, tuple(self.blocks()), self._examples)
        filters = filters_by_block(self.module, tuple(self.blocks()), self._examples)
        return {name: (*found, *filters[name]) for name, found in inner.items()}

    @cached_property
    def fused_sets(self) -> dict[str, tuple[FusedSet, ...]]:
        """The layers of each block that engines load as one tensor, by names in the block; without blocks that no example reaches."""
        return fused_sets_of(self.module, tuple(self.blocks()), self._examples)

    @cached_property
    def residual(self) -> Residual | str:
        """The residual stream, found with random weights; the reason where there is none that a rotation passes."""
        try:
            return residual_of(self.module, self.towers, self.edges, self._examples)
        except Refused as refused:
            return str(refused)

    @cached_property
    def time(self) -> TimePath | None:
        """The path of the time step: the family's, or as it is found by following it; None where there is none."""
        return self.family.time or time_path_of(self.module, self._examples)

    @cached_property
    def gates(self) -> frozenset[str]:
        """Full names of the linear layers that weigh experts, such as routers."""
        return gates_of(self.module, tuple(self.blocks()))

    def never_quantizes(self, name: str) -> bool:
        """Return True for a layer that no method quantizes unless asked by name: a router, or one that the family names."""
        return name in self.gates or matches(name, self.family.never_quantize)

    @cached_property
    def head(self) -> str:
        """Full name of the layer that gives logits, whatever the model calls it; empty where there is none."""
        find = getattr(self.module, "get_output_embeddings", None)
        head = find() if find is not None else None
        return next((name for name, part in self.module.named_modules() if part is head), "")

    def expand_patterns(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return patterns with the family's own lists (`@name`) written out; `lm_head` is the layer that gives logits by any name.

        Raises AerogelError for a list that the family does not have.
        """
        patterns = tuple(patterns)
        if "@time_path" in patterns and self.family.time is None and self.time is not None:
            patterns = tuple(one for pattern in patterns for one in (self.time.patterns if pattern == "@time_path" else (pattern,)))
        found = self.family.expand_patterns(patterns)
        return (*found, self.head) if "lm_head" in found and self.head else found

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks of every tower by full dotted name, in list order."""
        return {name: self.module.get_submodule(name) for tower in self.towers for name in tower.blocks}

    def forget_structure(self) -> None:
        """Find anew, when it is asked for, what was discovered inside of blocks and between them."""
        for found in ("edges", "coupled", "fused_sets", "residual", "time", "gates"):
            self.__dict__.pop(found, None)
        self.narrowings.clear()

    def rename_blocks(self, tower: Tower, names: Mapping[str, str]) -> None:
        """Follow a change of the blocks of a tower: those in `names` have new names, the others are gone.

        What else was discovered is found again when it is asked for.
        """
        left = tuple(names.values())
        self.__dict__["towers"] = tuple(Tower(one.name, left) if one == tower else one for one in self.towers)
        self.forget_structure()

        def renamed(name: str) -> str | None:
            block = next((block for block in tower.blocks if name.startswith(f"{block}.")), None)
            return name if block is None else f"{names[block]}{name.removeprefix(block)}" if block in names else None

        self.pruned = {new for name in self.pruned if (new := renamed(name)) is not None}
        self.sparsities = {new: share for name, share in self.sparsities.items() if (new := renamed(name)) is not None}

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
        with torch.no_grad(), self.reading(kwargs):
            return self.module(*args, **kwargs)

    @contextmanager
    def reading(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Turn what a model raises about the images in its inputs into AerogelError: its processor makes others than it was built for."""
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, AerogelError | torch.OutOfMemoryError) or not any(name.startswith("pixel_values") for name in inputs):
                raise
            raise AerogelError(
                f"{self.origin or f'this {self.family.name} model'} refuses the images in its inputs "
                f"({' '.join(str(error).split())[:200]}); the processor's files have to be those of this model, and images of your own "
                "in its dtype"
            ) from error


def _one_part(glob: str) -> str:
    """A glob in which `*` stands for one part of a dotted name, as a regular expression."""
    return r"[^.]+".join(re.escape(part) for part in glob.split("*"))
