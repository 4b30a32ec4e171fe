"""The schema of a quantization_config of compressed-tensors, or of ours: what has to be there, and of which kind."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

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


class _Config(BaseModel):
    version: str | None = None
    format: str | None = None
    config_groups: dict[str, _Group]
    ignore: list[str] | None = None
    kv_cache_scheme: _Tensor | None = None
    replacements: dict[str, _Replacement] = {}
    timestep_index: _Steps | None = None


def check(config: dict[str, Any]) -> None:
    """Raise AerogelError that names the first field of a config which is not as compressed-tensors writes it."""
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise AerogelError(f"quantization_config in config.json: {place}: {first['msg']}; fetch config.json again") from error
