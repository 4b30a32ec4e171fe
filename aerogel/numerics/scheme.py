"""Schemes: number format x granularity x symmetry x static or dynamic, for each tensor of a linear."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from aerogel.errors import AerogelError
from aerogel.numerics.formats import Format, format_named


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale has shape ()."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: scale_OG with G = 1."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` inputs of a row: scale_OG with G = ceil(I / size)."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise AerogelError(f"group size is {self.size}, expected at least 1")


@dataclass(frozen=True)
class PerBlock:
    """One scale for each rows x columns tile of a weight: scale has shape (ceil(O / rows), ceil(I / columns))."""

    rows: int
    columns: int


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of an activation: scale has the activation's shape with a last dimension of 1."""


@dataclass(frozen=True)
class PerHead:
    """One scale for each attention head of a key or value tensor."""


@dataclass(frozen=True)
class PerStep:
    """One scale for the whole tensor at each step of a sampler: scale_T with T = `count`; the step at hand picks one."""

    count: int


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken | PerHead | PerStep


@dataclass(frozen=True)
class TensorScheme:
    """Quantization of one tensor."""

    format: Format
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    """True where the scale is computed from the tensor at run time instead of being stored."""
    scale_format: Literal["float", "e8m0", "e4m3"] = "float"
    """The format that block scales are rounded to (mx: e8m0; nv: e4m3 under one float scale a tensor)."""

    def __post_init__(self) -> None:
        if not self.symmetric and self.format.kind == "float":
            raise AerogelError(f"{self.format} has no zero point: make the scheme symmetric")


_PRESET = re.compile(r"^W(?P<w>[2-8])A(?P<a>8|16)(?P<options>(_[A-Z0-9]+)*)$")
_FLOAT_PRESETS = ("FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")


@dataclass(frozen=True)
class Scheme:
    """Quantization of a linear layer: its weight, and its input if that is quantized too."""

    name: str
    weights: TensorScheme
    inputs: TensorScheme | None = None

    @property
    def bits(self) -> int:
        """Bits of one weight code."""
        return self.weights.format.bits

    @property
    def group(self) -> int | None:
        """Group size, or None when the weight has no groups."""
        granularity = self.weights.granularity
        return granularity.size if isinstance(granularity, PerGroup) else None

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, value: Scheme | str | Mapping[str, Any]) -> Scheme:
        """Read a scheme from its preset name or from a mapping `{preset, group, symmetric}`.

        Names are `W<bits>A<8|16>` and options joined by underscores: `G64` (group size), `CHANNEL`, `ASYM`, `STATIC`, `AFFINE` (STATIC with
        a zero point);
        or one of FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK, NVFP4A16, MXFP4A16. Without an option a weight-only scheme has symmetric
        groups of 128, and W8A8 has symmetric channels with dynamic per-token inputs. Raises AerogelError on anything else.
        """
        if isinstance(value, Scheme):
            return value
        if isinstance(value, str):
            return _named(value)
        return _mapped(value)

    @classmethod
    def of(cls, weights: TensorScheme, inputs: TensorScheme | None = None) -> Scheme:
        """Return the scheme of these parts under its preset name, or under a description when no preset means it."""
        size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else None
        options = "_CHANNEL" if size is None else f"_G{size}"
        options += "" if weights.symmetric else "_ASYM"
        if inputs is not None and not inputs.dynamic:
            options += "_STATIC" if inputs.symmetric else "_AFFINE"
        integer = f"W{weights.format.bits}A{16 if inputs is None else 8}{options}"
        for name in (integer.replace("A8_CHANNEL", "A8"), *_FLOAT_PRESETS):
            scheme = _named(name)
            if (scheme.weights, scheme.inputs) == (weights, inputs):
                return scheme
        return cls(f"{weights.format} weights, {_described(inputs)} inputs", weights, inputs)


def _described(inputs: TensorScheme | None) -> str:
    if inputs is None:
        return "float"
    steps = f" of {inputs.granularity.count} steps" if isinstance(inputs.granularity, PerStep) else ""
    return f"{inputs.format}{steps}"


def _named(name: str) -> Scheme:
    upper = name.upper()
    if upper in _FLOAT_PRESETS:
        return _float_preset(upper)
    match = _PRESET.match(upper)
    if match is None:
        raise AerogelError(
            f"unknown scheme {name!r}; expected W<2-8>A<8|16> with options _G<size>, _CHANNEL, _ASYM, _STATIC, _AFFINE "
            f"(for example W4A16_G64), or one of {', '.join(_FLOAT_PRESETS)}"
        )
    return _integer_preset(upper, int(match["w"]), int(match["a"]), match["options"].split("_")[1:])


def _integer_preset(name: str, weight_bits: int, input_bits: int, options: list[str]) -> Scheme:
    granularity: Granularity = PerChannel() if input_bits == 8 else PerGroup(128)
    symmetric, static, affine = True, False, False
    for option in options:
        if option == "ASYM":
            symmetric = False
        elif option == "CHANNEL":
            granularity = PerChannel()
        elif option in ("STATIC", "AFFINE") and input_bits == 8:
            static, affine = True, affine or option == "AFFINE"
        elif re.fullmatch(r"G[1-9]\d*", option):
            granularity = PerGroup(int(option[1:]))
        else:
            raise AerogelError(
                f"scheme {name!r}: option {option!r} is not known here; expected G<size>, CHANNEL, ASYM or (A8 only) STATIC or AFFINE"
            )
    weights = TensorScheme(format_named(f"int{weight_bits}"), granularity, symmetric)
    if input_bits == 16:
        return Scheme(name, weights)
    inputs = TensorScheme(format_named("int8"), PerTensor() if static else PerToken(), not affine, dynamic=not static)
    return Scheme(name, weights, inputs)


def _float_preset(name: str) -> Scheme:
    fp8, fp4 = format_named("fp8_e4m3"), format_named("fp4_e2m1")
    token = TensorScheme(fp8, PerToken(), dynamic=True)
    return {
        "FP8_DYNAMIC": Scheme(name, TensorScheme(fp8, PerChannel()), token),
        "FP8_STATIC": Scheme(name, TensorScheme(fp8, PerTensor()), TensorScheme(fp8, PerTensor())),
        "FP8_BLOCK": Scheme(name, TensorScheme(fp8, PerBlock(128, 128)), TensorScheme(fp8, PerGroup(128), dynamic=True)),
        "NVFP4A16": Scheme(name, TensorScheme(fp4, PerGroup(16), scale_format="e4m3")),
        "MXFP4A16": Scheme(name, TensorScheme(fp4, PerGroup(32), scale_format="e8m0")),
    }[name]


def _mapped(value: Mapping[str, Any]) -> Scheme:
    known = {"preset", "group", "symmetric"}
    unknown = set(value) - known
    if unknown or "preset" not in value:
        raise AerogelError(f"a scheme mapping has the keys preset (required), group and symmetric; got {sorted(value)}")
    scheme = _named(str(value["preset"]))
    weights = scheme.weights
    suffix = ""
    if "group" in value:
        if not isinstance(value["group"], int):
            raise AerogelError(f"group size is {value['group']!r}, expected a whole number")
        weights = replace(weights, granularity=PerGroup(value["group"]))
        suffix += f"_G{value['group']}"
    if "symmetric" in value:
        weights = replace(weights, symmetric=bool(value["symmetric"]))
        suffix += "" if value["symmetric"] else "_ASYM"
    return replace(scheme, name=scheme.name + suffix, weights=weights)
