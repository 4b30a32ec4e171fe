"""Blocks that write for later blocks into a mapping they are given, as those of Gemma 4 do, are walked like any others."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.structure.towers import Tower
from aerogel.model.walk import Walk


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.linear = number, nn.Linear(8, 8)

    def forward(self, x: Tensor, shared: Any) -> Tensor:
        if self.number == 0:
            shared["first"] = torch.sin(x), torch.cos(x)
        return x + self.linear(x) + (shared["first"][0] if self.number == 2 else 0)


class Stack(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(Layer(number) for number in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.kind()
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("on_disk", [False, True])
def test_later_blocks_read_what_was_written(kind: type, on_disk: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(Stack(kind), Family("stack", ("stack",)))
    network.towers = (Tower("layers", tuple(f"layers.{number}" for number in range(4))),)
    calls = [Call((torch.randn(2, 3, 8),)) for _ in range(2)]
    expected = [network.run(call) for call in calls]
    walk = Walk(network, calls, folder=tmp_path if on_disk else None)
    assert walk.route.needed_after(1) == {"layers.0", "layers.1"}
    assert walk.route.needed_after(2) == {"layers.0", "layers.2"}  # the last one is given what the first one wrote, too
    for block in walk:
        for _ in range(2):
            answers = [block.run(call) for call in block.calls]
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer, right)
