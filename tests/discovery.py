"""Discovery that is done once for all networks of the same classes, shapes and configuration: most tests are about something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from aerogel.engine.structure_file import key_of
from aerogel.model import network as networks
from aerogel.model.structure.probe import Refused

ORIGINAL: dict[str, Callable[..., Any]] = {
    name: getattr(networks, name) for name in ("examples_of", "towers_of", "edges_by_block", "residual_of")
}


class Remembered:
    """A function of a module that gives what it gave for one that differs in values only; without a configuration none is the same."""

    def __init__(self, name: str) -> None:
        self._function = ORIGINAL[name]
        self._found: dict[Any, Any] = {}

    def __call__(self, module: nn.Module, *others: Any) -> Any:
        config: Any = getattr(module, "config", None)
        if config is None:
            return self._function(module, *others)
        blocks = others[0] if self._function.__name__ == "edges_by_block" else ()
        key = key_of(module), next(module.parameters()).dtype, getattr(config, "_attn_implementation", ""), module.training, blocks
        if key not in self._found:
            try:
                self._found[key] = self._function(module, *others)
            except Refused as refused:
                self._found[key] = refused
        if isinstance(found := self._found[key], Refused):
            raise Refused(str(found))
        return found


def remember(patch: pytest.MonkeyPatch) -> None:
    """Remember what is discovered, until the patch is undone."""
    for name in ORIGINAL:
        patch.setattr(networks, name, Remembered(name))


def forget(patch: pytest.MonkeyPatch) -> None:
    """Discover everything anew, until the patch is undone."""
    for name, function in ORIGINAL.items():
        patch.setattr(networks, name, function)
