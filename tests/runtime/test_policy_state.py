"""States of policies: what is saved is read back typed, and what is wrong in a saved one is one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.runtime.policy_state import PolicyState, by_name


@dataclass(frozen=True, eq=False)
class Table(PolicyState):
    """One field of each kind."""

    steps: tuple[float, ...]
    rows: tuple[tuple[int, ...], ...]
    scored_by: Mapping[str, str]
    ratio_T: Tensor
    error: float | None = None
    grids: Mapping[str, Tensor] = by_name()


TABLE = Table((999.0, 1.0), ((1, 2), (3,)), {"mlp": "attn"}, torch.ones(2), grids={"a.scale": torch.zeros(1)})


def saved() -> dict[str, Any]:
    """What comes back from disk: JSON and tensors."""
    tensors = {key: value for key, value in TABLE.as_dict().items() if isinstance(value, Tensor)}
    return json.loads(json.dumps({key: value for key, value in TABLE.as_dict().items() if key not in tensors})) | tensors


def test_what_is_saved_is_read_back() -> None:
    assert saved().keys() == {"steps", "rows", "scored_by", "ratio_T", "a.scale"}  # flat, without what is None
    read = Table.read(saved(), "ours")
    assert (read.steps, read.rows, read.scored_by, read.error) == (TABLE.steps, TABLE.rows, TABLE.scored_by, None)
    assert torch.equal(read.ratio_T, TABLE.ratio_T)
    assert read.grids.keys() == {"a.scale"}
    assert Table.read(saved() | {"error": 1}, "ours").error == 1.0  # JSON does not tell 1 from 1.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"colour": "red"}, "ours: its saved state has an unknown field 'colour'"),
        ({"steps": None}, r"ours: field steps of its saved state"),
        ({"steps": ["first"]}, r"ours: field steps\[0\] of its saved state"),
        ({"ratio_T": 1.0}, "ours: field ratio_T of its saved state"),
    ],
)
def test_wrong_states_are_refused_by_field(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(AerogelError, match=expected):
        Table.read(saved() | change, "ours")


def test_missing_fields_are_named() -> None:
    with pytest.raises(AerogelError, match="ours: its saved state has no field 'rows'"):
        Table.read({key: value for key, value in saved().items() if key != "rows"}, "ours")
