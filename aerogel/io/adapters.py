"""LoRA adapters of PEFT: named where one is given instead of a model, merged into the weights of their base as these are read.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.io.headers import read_header
from aerogel.io.json_files import read_object
from aerogel.io.record.files import checksum_of
from aerogel.model.match import found_at_start

_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The file of an adapter's tensors."""
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_magnitude_vector.weight")
_Rank = Annotated[int, Field(ge=1, le=2**20)]


class _Config(BaseModel):
    peft_type: str
    base_model_name_or_path: str | None = None
    r: _Rank = 8
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)] = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    alora_invocation_tokens: list[int] | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder."""

    folder: Path
    config: _Config

    @property
    def base(self) -> str:
        """The model that it is for: a folder or a hub id."""
        return self.config.base_model_name_or_path or "its base model"

    def scaling(self, name: str) -> float:
        """Return the factor of the product of a layer."""
        rank = _of_pattern(self.config.rank_pattern, name, self.config.r)
        alpha = _of_pattern(self.config.alpha_pattern, name, self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The parts of each layer by the name of the layer, and tensors that take the place of the base's by their own, under ""."""
        read_header(self.folder / WEIGHTS)
        found: dict[str, dict[str, Tensor]] = {"": {}}
        for key, tensor in load_file(self.folder / WEIGHTS).items():
            name = key.removeprefix(_PREFIX)
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise AerogelError(f"{self.folder / WEIGHTS}: {key} is {tensor.dtype}, expected floats; save the adapter again")
            part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
            if part is None and "lora_" in name:
                raise AerogelError(f"{self.folder / WEIGHTS}: {key} is no part of LoRA for linear layers or embeddings; merge it with PEFT")
            if part is None:
                found[""][name] = tensor
            else:
                found.setdefault(name.removesuffix(f".{part}"), {})[part.removesuffix(".weight")] = tensor
        return found

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Return what a resumed run compares."""
        return {"config": self.config.model_dump(), "weights": checksum_of(self.folder / WEIGHTS)}


def adapter_in(folder: Path) -> Adapter | None:
    """Return the adapter of a folder that holds one and no model; raises AerogelError for one that is no LoRA, or damaged."""
    path = folder / _CONFIG
    if not path.is_file() or (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return None
    try:
        config = _Config.model_validate(read_object(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise AerogelError(f"{path}: {place}: {first['msg']}; save the adapter again") from error
    return Adapter(folder, config)


def require_mergeable(adapter: Adapter) -> None:
    """Raise AerogelError for an adapter that cannot be merged while weights are read."""
    config = adapter.config
    if config.peft_type != "LORA":
        raise AerogelError(f"{adapter.folder} is an adapter of type {config.peft_type}; only LoRA is merged here: merge it with PEFT first")
    if config.alora_invocation_tokens is not None:
        raise AerogelError(
            f"{adapter.folder} acts behind some tokens only (activated LoRA), which weights cannot say; serve it as an adapter"
        )
    if config.base_model_name_or_path is None:
        raise AerogelError(f"{adapter.folder / _CONFIG} does not name its base model; add base_model_name_or_path")
    if not (adapter.folder / WEIGHTS).is_file():
        raise AerogelError(f"{adapter.folder} has no {WEIGHTS}; only safetensors are opened, save the adapter again")


def require_no_adapters(module: nn.Module) -> None:
    """Raise AerogelError where a layer of a module in memory is wrapped by an adapter of PEFT, merged or not."""
    for name, part in module.named_modules():
        if hasattr(part, "base_layer") and hasattr(part, "active_adapters"):
            raise AerogelError(
                f"{name} has an adapter beside its weight: merge it before (PEFT: model.merge_and_unload(); diffusers: "
                "pipeline.fuse_lora() and pipeline.unload_lora_weights())"
            )


def merging(adapter: Adapter, base: Dequantize | None) -> Dequantize:
    """Return what merges an adapter into the tensors of its base, quantized or not."""
    return partial(_merged, adapter, base)


def _merged(adapter: Adapter, base: Dequantize | None, disk: OnDisk) -> dict[str, Dequantized | None]:
    floats = dict(base(disk)) if base is not None else {}
    for name, change in _changes(adapter):
        found = floats.get(name)
        if found is None and (name not in disk.entries or name in floats):
            raise AerogelError(f"{adapter.folder} changes {name}, which {adapter.base} does not have; give the adapter of this model")
        plain = Dequantized(name, (), disk.entries[name], _as_it_is, entry_parts=(), format="") if found is None else found
        entry = plain.entry
        if len(entry.shape) > 2:
            raise AerogelError(f"{adapter.folder} changes {name}, the weights of several experts in one; merge it with PEFT first")
        change.require(entry.shape, f"{adapter.folder / WEIGHTS}: the adapter of {name}")
        floats[name] = replace(plain, make=partial(_change, plain.make, change))
    return floats


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _change(make: Callable[..., Tensor], change: _Change, *parts: Tensor) -> Tensor:
    weight = make(*parts)
    return change(weight.float()).to(weight.dtype)


@dataclass(frozen=True)
class _Change:
    """A change of one tensor: W + scaling * B A, with DoRA rows of a given length, or another tensor."""

    delta: Callable[[], Tensor]
    shape: tuple[int, ...]
    magnitude_O: Tensor | None = None
    replaces: bool = False
    transposed: bool = False
    """True where the base stores inputs first (Conv1D of transformers)."""

    def require(self, shape: tuple[int, ...], what: str) -> None:
        """Raise AerogelError unless a tensor of the base has this shape."""
        if shape != self.shape:
            raise AerogelError(f"{what} is {list(self.shape)}, the base has {list(shape)}; give the adapter of this model")

    def __call__(self, weight: Tensor) -> Tensor:
        delta = self.delta().to(weight.device)
        if self.replaces:
            return delta
        if self.transposed:
            return self._added(weight.T, delta).T
        return self._added(weight, delta)

    def _added(self, weight_OI: Tensor, delta_OI: Tensor) -> Tensor:
        found_OI = weight_OI + delta_OI
        if self.magnitude_O is None:
            return found_OI
        return found_OI * (self.magnitude_O.to(weight_OI.device).float() / found_OI.norm(dim=1))[:, None]


def _changes(adapter: Adapter) -> Iterator[tuple[str, _Change]]:
    """Yield the changes by the names of the base's tensors."""
    for name, tensor in adapter.layers[""].items():
        yield name.replace(".modules_to_save", "").replace(".base_layer", ""), _Change(tensor.float, tuple(tensor.shape), replaces=True)
    for layer, parts in adapter.layers.items():
        if layer:
            yield f"{layer}.weight", _of_layer(adapter, layer, parts)


def _of_layer(adapter: Adapter, layer: str, parts: Mapping[str, Tensor]) -> _Change:
    embeds = "lora_embedding_A" in parts
    first, second = (parts.get(f"lora_embedding_{part}" if embeds else f"lora_{part}") for part in "AB")
    where = f"{adapter.folder / WEIGHTS}: {layer}"
    if first is None or second is None:
        raise AerogelError(f"{where} has one of two matrices; save the adapter again")
    if first.ndim != 2 or second.ndim != 2 or second.shape[1] != first.shape[0]:
        raise AerogelError(f"{where} has matrices of {list(first.shape)} and {list(second.shape)}; only those of linear layers are merged")
    scaling, turned = adapter.scaling(layer), embeds or adapter.config.fan_in_fan_out

    def delta() -> Tensor:
        product = second.float() @ first.float() * scaling
        return product.T if embeds else product

    shape = (first.shape[1], second.shape[0]) if turned else (second.shape[0], first.shape[1])
    magnitude = parts.get("lora_magnitude_vector")
    return _Change(delta, tuple(shape), None if magnitude is None else magnitude.flatten(), transposed=adapter.config.fan_in_fan_out)


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that names a layer, as PEFT looks it up: by the end of its name."""
    for pattern, value in (patterns or {}).items():
        if found_at_start(rf"re:(.*\.)?({pattern})$", name):
            return value
    return otherwise


def describe(adapter: Adapter) -> str:
    """Return a line for plans."""
    kind = "DoRA" if adapter.config.use_dora else "LoRA"
    return f"the {kind} adapter {adapter.folder.name} of {adapter.base} is merged into {len(adapter.layers) - 1} layers as they are read"
