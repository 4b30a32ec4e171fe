"""Runtime policies on disk: their states as tensors beside the weights and numbers in aerogel.json, put back on as contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from aerogel.methods.method import RuntimePolicy
from aerogel.model.network import Network
from aerogel.model.states import STATES, stored
from aerogel.recipe import Recipe, Step


@dataclass(frozen=True)
class Measured:
    """A policy with the state that its calibration gave."""

    step: Step
    state: dict[str, Any]
    """Tensors, numbers and texts by name."""


@contextmanager
def on(network: Network, policies: Sequence[Measured]) -> Iterator[None]:
    """Put policies on in the order of the recipe; afterwards the network is what it was."""
    with ExitStack() as stack:
        for measured in policies:
            assert isinstance(measured.step.method, RuntimePolicy)
            stack.enter_context(measured.step.method.on(network, measured.state))
        yield


def save(policies: Sequence[Measured], folder: Path) -> list[dict[str, Any]]:
    """Write the tensors of all states into a folder; the rest is returned for aerogel.json."""
    tensors = {
        f"{number}.{key}": value.detach().contiguous()
        for number, measured in enumerate(policies)
        for key, value in measured.state.items()
        if isinstance(value, Tensor)
    }
    if tensors:
        save_file(tensors, folder / STATES)
    return [
        {"step": measured.step.as_dict(), "state": {key: value for key, value in measured.state.items() if not isinstance(value, Tensor)}}
        for measured in policies
    ]


def load(folder: Path | None) -> list[Measured]:
    """Read back what `save` wrote; empty when the folder has no policies."""
    if folder is None:
        return []
    read = []
    for named, state in stored(folder):
        (step,) = Recipe.parse({"steps": [named]}).steps
        read.append(Measured(step, state))
    return read
