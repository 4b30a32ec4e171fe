"""MustDrop in the contract matrix, whose images have two by two patches; its rule is tested in test_tower_rules.py."""

from __future__ import annotations

from aerogel.methods.tower_tokens.mustdrop import Mustdrop
from tests.tiny import opened

MATRIX = {"options": {"window": 2, "keep": 1}}


def test_windows_that_do_not_divide_the_grid_are_refused() -> None:
    (why,) = Mustdrop().problems(opened("llava"), None)  # type: ignore[arg-type]
    assert why == "windows of 3 x 3 patches do not divide its 2 x 2 patches; give another window"
