"""Whatever stands in a file from outside, its parser takes it or refuses it in one line.

The usual tests make a few examples of each kind, the same ones every time; `make fuzz` makes thousands.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.examples import examples
from tests.fuzz.targets import TARGETS

FEW = settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
AMOUNT = settings.get_profile("fuzz") if settings.get_current_profile_name() == "fuzz" else FEW


@pytest.mark.parametrize("name", TARGETS)
@AMOUNT
@given(st.data())
def test_only_one_line_comes_out(name: str, data: st.DataObject) -> None:
    TARGETS[name].check(data.draw(examples(TARGETS[name])))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_is_taken(name: str) -> None:
    for content in TARGETS[name].sound():
        TARGETS[name].check(content)
