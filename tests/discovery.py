"""Discovery that is done once for networks of the same classes, shapes, configuration and examples: most tests are about other things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from aerogel.engine.structure_file import key_of
from aerogel.model import network as networks
from aerogel.model.calls import tensors_in
from aerogel.model.structure.examples import Example
from aerogel.model.structure.probe import Refused

ORIGINAL: dict[str, Callable[..., Any]] = {
    name: getattr(networks, name) for name in ("examples_of", "towers_of", "edges_by_block", "fused_sets_of", "residual_of")
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
        blocks = others[0] if self._function.__name__ in ("edges_by_block", "fused_sets_of") else ()
        watched = _shapes(others[-1]) if others else ()
        key = key_of(module), next(module.parameters()).dtype, getattr(config, "_attn_implementation", ""), module.training, blocks, watched
        if key not in self._found:
            try:
                self._found[key] = self._function(module, *others)
            except Refused as refused:
                self._found[key] = refused
        if isinstance(found := self._found[key], Refused):
            raise Refused(str(found))
        return found


def _shapes(examples: Sequence[Example]) -> tuple[Any, ...]:
    """The parts of a network that examples are of, and the shapes of what they are given."""
    calls = [(example.part, example.call) for example in examples]
    return tuple((part, *(tuple(tensor.shape) for tensor in tensors_in((call.args, call.kwargs)))) for part, call in calls)


def remember(patch: pytest.MonkeyPatch) -> None:
    """Remember what is discovered, until the patch is undone."""
    for name in ORIGINAL:
        patch.setattr(networks, name, Remembered(name))


def forget(patch: pytest.MonkeyPatch) -> None:
    """Discover everything anew, until the patch is undone."""
    for name, function in ORIGINAL.items():
        patch.setattr(networks, name, function)
