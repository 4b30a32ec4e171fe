"""The schema of a quantization_config of compressed-tensors, or of ours: what has to be there, and of which kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from aerogel.errors import AerogelError

_Size = Annotated[int, Field(ge=1, le=2**31)]


class _Tensor(BaseModel):
    num_bits: Annotated[int, Field(ge=1, le=64)] = 8
    type: str = "int"
    symmetric: bool = True
    dynamic: bool | str = False
    strategy: str | None = None
    group_size: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    block_structure: tuple[_Size, _Size] | None = None
    steps: _Size | None = None
    actorder: str | bool | None = None


class _Group(BaseModel):
    targets: list[str]
    weights: _Tensor | None = None
    input_activations: _Tensor | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Steps(BaseModel):
    steps: list[float]
    sampler: str | None = None


class _Replacement(BaseModel):
    kind: str


class _Apply(BaseModel):
    location: str


class _Transform(BaseModel):
    apply: list[_Apply] = []


class _Transforms(BaseModel):
    config_groups: dict[str, _Transform] = {}


class MaskedTensor(BaseModel):
    """A tensor that is stored as a bit mask and values (io/bitmask.py)."""

    shape: Annotated[list[_Size], Field(min_length=2)]
    """Shape of the dense tensor, of packed codes in codes."""
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of a packed code; None for a tensor whose numbers are its elements."""

    @model_validator(mode="after")
    def _packed_are_matrices(self) -> Self:
        if self.bits is not None and len(self.shape) != 2:
            raise ValueError("packed integer codes have a shape of two dimensions")
        return self


class _Sparsity(BaseModel):
    format: str = "dense"
    tensors: dict[str, MaskedTensor] = {}


class _Config(BaseModel):
    version: str | None = None
    format: str | None = None
    config_groups: dict[str, _Group]
    ignore: list[str] | None = None
    kv_cache_scheme: _Tensor | None = None
    replacements: dict[str, _Replacement] = {}
    narrowed: dict[str, Annotated[dict[str, _Size], Field(min_length=1)]] = {}
    timestep_index: _Steps | None = None
    transform_config: _Transforms | None = None
    sparsity_config: _Sparsity | None = None
    empty_weight: str | None = None


_OF_WEIGHTS = ("weight_input", "weight_output")
"""Places of rotations that are in the weights already; others rotate activations while the model runs."""


def check(config: dict[str, Any]) -> None:
    """Raise AerogelError that names the first field of a config which is not as compressed-tensors writes it, or which is not read."""
    try:
        found = _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise AerogelError(f"quantization_config in config.json: {place}: {first['msg']}; fetch config.json again") from error
    rotations = found.transform_config.config_groups.values() if found.transform_config else ()
    if places := {one.location for rotation in rotations for one in rotation.apply} - {*_OF_WEIGHTS}:
        raise AerogelError(
            f"quantization_config in config.json: transform_config rotates activations ({min(places)}) while the model runs, which is not "
            "done here; give the original model in 16 bits"
        )
    if found.sparsity_config and found.sparsity_config.format not in ("dense", "bitmask"):
        raise AerogelError(
            f"quantization_config in config.json: sparsity_config has the format {found.sparsity_config.format!r}, expected 'dense' or "
            "'bitmask'; give the original model in 16 bits"
        )


def masked_tensors(config: Mapping[str, Any]) -> dict[str, MaskedTensor]:
    """Return the tensors that a config, which `check` has seen, says are stored as bit masks, by their names on disk."""
    sparsity = _Sparsity.model_validate(config.get("sparsity_config") or {})
    return sparsity.tensors if sparsity.format == "bitmask" else {}
