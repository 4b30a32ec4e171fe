"""Number formats as data: what one code can hold; ranges, storage and printing follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from aerogel.errors import AerogelError


@dataclass(frozen=True)
class Format:
    """A set of numbers that one code can stand for.

    Integer codes are signed whether or not the scheme is symmetric: an asymmetric scheme moves its zero
    point inside the signed range, which is the convention of compressed-tensors.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    low: float
    """Smallest representable value, before scaling."""
    high: float
    """Largest representable value, before scaling."""
    storage: torch.dtype
    """The dtype that holds one unpacked code."""
    levels: tuple[float, ...] | None = None
    """Non-negative values of a format torch has no dtype for; a code is sign bit + index."""

    def __str__(self) -> str:
        return self.name


def _int(bits: int) -> Format:
    half = 2 ** (bits - 1)
    return Format(f"int{bits}", "int", bits, -half, half - 1, torch.int8)


FORMATS: dict[str, Format] = {
    **{f"int{bits}": _int(bits) for bits in range(2, 9)},
    "fp8_e4m3": Format("fp8_e4m3", "float", 8, -448.0, 448.0, torch.float8_e4m3fn),
    "fp8_e5m2": Format("fp8_e5m2", "float", 8, -57344.0, 57344.0, torch.float8_e5m2),
    "fp4_e2m1": Format("fp4_e2m1", "float", 4, -6.0, 6.0, torch.uint8, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
}


def format_named(name: str) -> Format:
    """Return the format called `name`; raises AerogelError that lists the known ones."""
    if name not in FORMATS:
        raise AerogelError(f"unknown number format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
