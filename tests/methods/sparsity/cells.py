"""One small block with a method's visit behind it: what it was, what went in, what the method noted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.layers.conv import matrix
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network


class Cell(nn.Module):
    """Two linears that share an input, one behind them, one that never runs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 12), nn.Linear(width, 20)
        self.behind, self.idle = nn.Linear(32, 8), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.cat([self.left(x), self.right(x).relu()], -1))


class Images(nn.Module):
    """Convolutions of three geometries, two of which read the same image, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.short = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)
        self.grouped = nn.Conv2d(6, 8, 3, stride=2, padding="valid", groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.first(x) + self.short(x))


@dataclass
class Visited:
    """A block after a method's visit."""

    block: Block
    before: dict[str, Tensor]
    x: Tensor
    """All inputs, as rows where they are."""

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        return {note["name"].removeprefix("cell."): note for note in self.block.notes}

    def weight(self, name: str) -> Tensor:
        return matrix(self.block.module.get_submodule(name))  # type: ignore[arg-type]

    def kept(self, name: str) -> Tensor:
        return self.weight(name) != 0

    def error(self, name: str) -> float:
        """Squared error of the output of a linear that reads the block's input."""
        return float((self.x @ (self.weight(name) - self.before[name]).T).square().sum())


def inputs(calls: int = 6, width: int = 32, scale: Tensor | float = 1.0, seed: int = 0) -> list[Tensor]:
    """Correlated inputs, as those of real networks are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 2, width, generator=generator)
    made = [torch.randn(4, 9, width // 2, generator=generator) @ mixing for _ in range(calls)]
    return [(x + 0.3 * torch.randn(x.shape, generator=generator)) * scale for x in made]


def visit(method: Any, xs: list[Tensor] | None = None, module: nn.Module | None = None, **layers: Tensor) -> Visited:
    """Let a method visit a block; `layers` are weights to start from."""
    torch.manual_seed(0)
    module = (Cell() if module is None else module).requires_grad_(False)
    xs = inputs() if xs is None else xs
    for name, weight in layers.items():
        module.get_submodule(name).weight = nn.Parameter(weight.clone(), requires_grad=False)
    block = Block("cell", module, 0, 1, [Call((x,)) for x in xs], Network(module, Family("f", ("f",))))  # type: ignore[arg-type]
    before = {name: matrix(layer).clone() for name, layer in module.named_children()}  # type: ignore[arg-type]
    method.compress(block)
    return Visited(block, before, torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]))
