"""Runtime policies on disk: their states as tensors beside the weights and numbers in aerogel.json, put back on as contexts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from aerogel.engine.provenance import FACTS
from aerogel.methods.method import RuntimePolicy
from aerogel.model.network import Network
from aerogel.recipe import Recipe, Step

STATES = "aerogel.safetensors"


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
    path = folder / FACTS
    lines: Sequence[Mapping[str, Any]] = json.loads(path.read_text()).get("policies", []) if path.exists() else []
    tensors = load_file(folder / STATES) if (folder / STATES).exists() else {}
    read = []
    for number, line in enumerate(lines):
        (step,) = Recipe.parse({"steps": [line["step"]]}).steps
        own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(number)}
        read.append(Measured(step, {**line["state"], **own}))
    return read
