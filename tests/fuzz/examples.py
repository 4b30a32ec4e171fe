"""Examples for fuzzing: a sound content with bytes changed, with values in it replaced, and bytes of any kind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.targets import Target, structured

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**12, 10**400, -(2**63), 0.5, 1e308, float("nan"), float("inf")])
WORDS = st.sampled_from(
    ["", "x", "..", "/", "*", "re:[", "re:(a|a)*$", "Linear", "\x00", "\ud800", "W4A16", "int", "float", "F32", "a" * 300]
)
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def examples(target: Target) -> st.SearchStrategy[bytes]:
    """Contents of a target's file, most of them nearly sound."""
    sound = st.sampled_from(target.sound())
    return st.one_of(sound.flatmap(_replaced), sound.flatmap(_replaced), sound.flatmap(_changed), st.binary(max_size=64))


@st.composite
def _changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes replaced, left out or put in, in the first thousand."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(made), 1000)))
        made[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(made) if draw(st.booleans()) else bytes(made[: draw(st.integers(0, len(made)))])


@st.composite
def _replaced(draw: st.DrawFn, data: bytes) -> bytes:
    """Values somewhere inside replaced, left out, or put in under new names."""
    values = structured(data)
    if values is None:
        return draw(_changed(data))
    for _ in range(draw(st.integers(1, 3))):
        values = _edited(draw, values)
    written = json.dumps(values).encode()
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        return len(written).to_bytes(8, "little") + written + data[8 + length :]
    return written


def _edited(draw: st.DrawFn, values: Any) -> Any:
    if not isinstance(values, dict | list) or not values or draw(st.integers(0, 5)) == 0:
        return draw(ANY)
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = draw(st.sampled_from(keys))
    made = values.copy()
    match draw(st.integers(0, 5)):
        case 0:
            del made[key]
        case 1 if isinstance(made, dict):
            made[draw(WORDS)] = draw(ANY)
        case _:
            made[key] = _edited(draw, made[key])
    return made
