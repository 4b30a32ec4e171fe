"""Integer codes in words of before compressed-tensors 0.18, read as they are packed since (numerics/packing.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Piece
from aerogel.layers.layout import format_of
from aerogel.numerics.packing import pack, unpack_padded
from aerogel.numerics.scheme import Scheme

FIRST = "0.18.0"
"""The release of compressed-tensors since which codes of 3, 5, 6 and 7 bits follow one another without gaps: `version` in configs."""


def padded(config: Mapping[str, Any]) -> bool:
    """Return True where a quantization_config is of an earlier release, by its `version`; folders of Aerogel had none then."""
    numbers = re.findall(r"\d+", str(config.get("version") or ""))[:2]
    return [int(number) for number in numbers] < [int(number) for number in FIRST.split(".")[:2]]


def differs(scheme: Scheme) -> bool:
    """Return True for a scheme whose words were others then."""
    return format_of(scheme) == "pack-quantized" and 32 % scheme.bits != 0


def repacked(name: str, scheme: Scheme, rows: int, columns: int) -> dict[str, Piece]:
    """Return the tensor of this full name in a padded checkpoint as it is packed since, for a layer of this shape; nothing for others."""
    part = name.rpartition(".")[2]
    if not differs(scheme) or part not in ("weight_packed", "weight_zero_point"):
        return {}
    along = (columns, 1) if part == "weight_packed" else (rows, 0)

    def again(words: Tensor) -> Tensor:
        return pack(unpack_padded(words, scheme.bits, *along), scheme.bits, along[1])

    return {name: Piece(slice(None), again)}


def require_unpadded(config: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> None:
    """Raise AerogelError where a reader that takes tensors as they are would take words for others."""
    if padded(config) and (name := next((name for name, scheme in schemes.items() if differs(scheme)), None)):
        raise AerogelError(
            f"{name} has {schemes[name].bits}-bit integer codes, packed as before compressed-tensors {FIRST}; "
            "write the folder anew with `aerogel export FOLDER --format compressed_tensors`"
        )
