"""Base of exporters: they rewrite a saved folder for another engine, tensor by tensor, and refuse beforehand what they cannot express."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io import own_tensors
from aerogel.io.checkpoint import Checkpoint, Piece
from aerogel.io.dequantize import dequantizer_of
from aerogel.io.json_files import read_object
from aerogel.io.kv_scales import belongs_to_cache, scheme_in
from aerogel.io.load import family_of, part_of
from aerogel.io.names import Names
from aerogel.io.packed_words import padded, repacked
from aerogel.io.quantized import assignments, quantization_of, replacements
from aerogel.io.skeleton import names_of
from aerogel.layers.layout import Stored, decode
from aerogel.layers.narrowed import KEY
from aerogel.layers.replacement import Assigned, class_of
from aerogel.model.family import Family
from aerogel.numerics.quantize import dequantize
from aerogel.runtime.policy_state import PolicyState

# Every tensor that a quantized linear keeps, its bias apart.
_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx"),
    *("input_scale", "input_zero_point"),
)


class SavedPolicy(NamedTuple):
    """A runtime policy of a saved folder."""

    name: str
    """Name of the method, as recipes call it."""
    method: Any
    """The method with its options."""
    state: PolicyState
    """Result of its calibration, as the method takes it."""


@dataclass(frozen=True)
class Source:
    """A saved folder, and what an exporter needs to read it."""

    folder: Path
    families: Sequence[Family]
    """All known families, the folder's own among them."""
    policies: Sequence[SavedPolicy] = ()
    """The folder's runtime policies in the order in which they are put on."""

    @property
    def denoiser(self) -> Source:
        """The sub-folder of a pipeline that holds its denoiser; any other folder itself."""
        return replace(self, folder=part_of(self.folder))


class Exporter(ABC):
    """Writes a saved folder anew in another format, without calibration; its fields are its options."""

    @abstractmethod
    def refuse(self, source: Source) -> list[str]:
        """Return why the folder cannot be expressed in this format, reason by reason; empty when it can."""

    @abstractmethod
    def write(self, source: Source, output: Path) -> None:
        """Write the new folder; raises AerogelError with the first reason when the folder is refused, or when the disk fails."""

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True for a runtime policy that acts in the exported folder too."""
        return False

    def accept(self, source: Source) -> None:
        """Raise AerogelError with the first reason when the folder is refused."""
        if reasons := self.refuse(source):
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise AerogelError(f"{source.folder} cannot be written as {type(self).__name__}: {reasons[0]}{more}")


@dataclass(frozen=True)
class Master:
    """A saved folder that is read one linear at a time."""

    folder: Path
    config: dict[str, Any]
    family: Family
    names: Names
    checkpoint: Checkpoint
    """Its tensors by their names in memory."""

    @classmethod
    def open(cls, source: Source) -> Master:
        """Open a folder with one network; raises AerogelError when it is damaged or of an unknown family."""
        folder = source.folder
        path = folder / "config.json"
        config = read_object(path, "give a folder that `aerogel compress` wrote")
        family = family_of(source.families, config.get("model_type"), config.get("_class_name"), config)
        names = names_of(folder, config)
        dequantize = dequantizer_of(config, folder)
        stored = dequantize or own_tensors.reader(config, folder)
        checkpoint = Checkpoint.open(folder, names.in_memory, dequantize=stored)
        checkpoint.verify()
        found = cls(folder, config, family, names, checkpoint)
        if dequantize is not None or not padded(found.quantization):
            return found
        return replace(found, checkpoint=Checkpoint.open(folder, names.in_memory, found._repacked, stored))

    def _repacked(self, name: str, _: Callable[[], tuple[int, ...]]) -> dict[str, Piece]:
        layer = name.rpartition(".")[0]
        return repacked(name, self.linears[layer].scheme, *self.shape(layer)) if layer in self.linears else {}

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config, empty when the folder has none."""
        return quantization_of(self.config)

    @cached_property
    def linears(self) -> dict[str, Assigned]:
        """The quantized linear layers by full name in memory."""
        scales = [name.removesuffix(".weight_scale") for name in self.checkpoint.names() if name.endswith(".weight_scale")]
        return assignments(self.quantization, scales) if scales else {}

    @cached_property
    def floats(self) -> list[str]:
        """Names of the tensors that are no part of a quantized weight, without the scales of a key-value cache."""
        taken = {f"{name}.{part}" for name in self.linears for part in _PARTS}
        caches = scheme_in(self.quantization) is not None
        return [name for name in self.checkpoint.names() if name not in taken and not (caches and belongs_to_cache(name))]

    def shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a quantized linear."""
        if f"{name}.weight_shape" in self.checkpoint:
            rows, columns = self.checkpoint.tensor(f"{name}.weight_shape").tolist()
            return rows, columns
        packed = f"{name}.weight_packed"
        rows, columns = self.checkpoint.shape(packed if packed in self.checkpoint else f"{name}.weight")
        return rows, columns * (2 if packed in self.checkpoint else 1)

    def stored(self, name: str) -> Stored:
        """Read and unpack one quantized linear."""
        tensors = {part: self.checkpoint.tensor(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in self.checkpoint}
        return decode(tensors, self.linears[name].scheme, self.shape(name)[1])

    def dequantized(self, name: str) -> Tensor:
        """The float32 weight_OI of one quantized linear."""
        codes, grid, g_idx, _ = self.stored(name)
        return dequantize(codes, grid, self.linears[name].scheme.weights, torch.float32, g_idx)


def inexpressible(master: Master) -> list[str]:
    """Return the reasons why formats of plain quantized linear layers refuse a folder: its replacement layers and narrower layers."""
    layers = [f"{name} {class_of(told['kind']).effect}" for name, told in replacements(master.quantization).items()]
    return layers + [f"{name} is narrower than the model's configuration says" for name in master.quantization.get(KEY, {})]


def unsuitable_layers(master: Master, reason: Callable[[str], str | None]) -> list[str]:
    """Return the reasons why a format of quantized linear layers refuses a folder: that it has none, or what `reason` says of each name."""
    if not master.linears:
        return ["no linear layer in it is quantized"]
    return [f"{name}: {why}" for name in master.linears if (why := reason(name))] + inexpressible(master)


def not_language(master: Master) -> list[str]:
    """The reason why formats of language engines refuse a folder that holds a denoiser."""
    if master.family.modality in ("text", "image-text"):
        return []
    return [f"engines that read this format run language models, not {master.family.name} models"]
