"""Networks with pruned layers, walked beside the original, for tests of what adjusts the weights that are left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.engine.teacher import TeacherWalk
from aerogel.engine.visits import compress_block
from aerogel.layers.conv import Layer, matrix
from aerogel.methods.base import BlockMethod
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from aerogel.numerics.sparsity import kept_by_count
from aerogel.recipe import Recipe

Chosen = Callable[[str, nn.Module], bool]


def prune(block: Block, share: float, chosen: Chosen) -> None:
    """Prune the smallest weights of some layers of a block."""
    for name, layer in block.linears(("Linear", "Conv2d"), ("lm_head",)).items():
        if isinstance(layer, Layer) and chosen(name, layer):
            scores_OI = matrix(layer).abs()
            block.prune(name, kept_by_count(scores_OI, round(share * scores_OI.numel())))


def visit(
    network: Network,
    calls: Sequence[Call],
    steps: Sequence[dict[str, Any]],
    share: float = 0.6,
    chosen: Chosen = lambda name, layer: True,
    see: Callable[[Block, str], None] = lambda block, when: None,
) -> list[dict[str, Any]]:
    """Prune every block and let the steps adjust it; returns the notes. `see` is shown each block before and after the steps."""
    teacher = copy.deepcopy(network)
    methods = Recipe.parse({"name": "r", "steps": list(steps)}).steps
    notes: list[dict[str, Any]] = []
    for block in TeacherWalk(Walk(network, calls, around=True), teacher, calls, None):
        prune(block, share, chosen)
        see(block, "before")
        for step in methods:
            assert isinstance(step.method, BlockMethod)
            compress_block(block, step)
        see(block, "after")
        notes += block.notes
    return notes


def zeros(network: Network) -> dict[str, Tensor]:
    """Where the weights of pruned layers are zero."""
    return {name: matrix(network.module.get_submodule(name)) == 0 for name in sorted(network.pruned)}  # type: ignore[arg-type]


class TinyCnn(nn.Module):
    """Two residual blocks of convolutions, with batch norms and activations as modules; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([ResidualBlock(8) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Convolution, norm, activation, convolution, norm, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1, self.act = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.second(self.act(self.norm1(self.first(x))))))


def tiny_cnn() -> TinyCnn:
    """The network in evaluation mode with statistics that matter."""
    torch.manual_seed(0)
    network = TinyCnn().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias, 0, 0.1)
    return network.requires_grad_(False)


def images(count: int = 3) -> list[Call]:
    """Calls of four images each."""
    generator = torch.Generator().manual_seed(1)
    return [Call((), {"pixel_values": torch.randn(4, 3, 6, 6, generator=generator)}) for _ in range(count)]
