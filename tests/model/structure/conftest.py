"""Tests of discovery discover."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import discovery


@pytest.fixture(autouse=True)
def discovery_each_time(discovery_once: None) -> Iterator[None]:
    """Nothing is taken from another test."""
    with pytest.MonkeyPatch.context() as patch:
        discovery.forget(patch)
        yield
