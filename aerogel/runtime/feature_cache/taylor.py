"""Cached outputs extrapolated by a Taylor series: finite differences between computed steps stand for derivatives (TaylorSeer)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch.utils import _pytree as pytree

from aerogel.runtime.feature_cache.schedule import CacheEntry


class _Kept(NamedTuple):
    """A module's outputs and their finite differences, the newest."""

    row: int
    differences: tuple[Any, ...]


class TaylorSeries(CacheEntry):
    """A cache entry that predicts from the last computed outputs."""

    remembers: ClassVar[bool] = True

    def __init__(self, own: Callable[..., Any], order: int) -> None:
        super().__init__(own)
        self._order = order

    def keep(self, made: Any) -> _Kept:
        """The output, and what it and the last ones say of the derivatives."""
        before: _Kept | None = self.value
        found = [made]
        if before is not None:
            apart = self.row - before.row
            for old in before.differences[: self._order]:
                found.append(pytree.tree_map(lambda a, b: (a - b) / apart, found[-1], old))
        return _Kept(self.row, tuple(found))

    def give(self) -> tuple[Any, Any]:
        """The series so many steps behind the last output."""
        kept: _Kept = self.value
        ahead = self.row - kept.row
        given = kept.differences[0]
        for order, difference in enumerate(kept.differences[1:], 1):
            weight = ahead**order / math.factorial(order)
            given = pytree.tree_map(lambda a, b, weight=weight: a + weight * b, given, difference)
        return given, kept
