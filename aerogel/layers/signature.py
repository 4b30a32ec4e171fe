"""Signatures of forwards: the names that a module's arguments go by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that modules of this class are called with, in order."""
    return _arguments(type(module).forward)


@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
