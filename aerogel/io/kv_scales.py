"""Static scales of a key-value cache that a quantized checkpoint holds beside its weights, and the scheme that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aerogel.io.checkpoint import Checkpoint, Dequantize, Dequantized
from aerogel.io.headers import Entry

# What compressed-tensors and its predecessors call the scales of an attention's keys and values.
_NAMES = {
    **{f".{prefix}{part}_scale": f".{part}_scale" for part in ("k", "v") for prefix in ("", f"{part}_proj.")},
    **{f".{part}_proj.output_scale": f".{part}_scale" for part in ("k", "v")},
}
# Scales of queries and zero points, which symmetric caches have no use for.
_UNUSED = (".q_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point")


def scheme_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `kv_cache_scheme` of a quantization_config; None where it has none."""
    return config.get("kv_cache_scheme") or None


def leave_unread(config: Mapping[str, Any]) -> Dequantize | None:
    """Return what keeps a checkpoint from answering to the scales of a cache, which no module owns; None where there are none."""
    return _scales if scheme_in(config) else None


def belongs_to_cache(name: str) -> bool:
    """Return True for the name of a scale or zero point of a cache."""
    return _suffix(name) is not None or name.endswith(_UNUSED)


def read(folder: Path, config: Mapping[str, Any], rename: Any = str) -> dict[str, Tensor]:
    """Return the scales by the name of their attention and `k_scale` or `v_scale`; `rename` gives names in memory."""
    if scheme_in(config) is None:
        return {}
    checkpoint = Checkpoint.open(folder)
    found = {}
    for name in checkpoint.names():
        if suffix := _suffix(name):
            found[rename(name.removesuffix(suffix) + _NAMES[suffix])] = checkpoint.tensor(name).float()
    return found


def _suffix(name: str) -> str | None:
    # The longest: that of a layer also ends like that of an attention.
    return next((suffix for suffix in sorted(_NAMES, key=len, reverse=True) if name.endswith(suffix)), None)


def _scales(entries: Mapping[str, Entry]) -> dict[str, Dequantized | None]:
    return dict.fromkeys(filter(belongs_to_cache, entries))
