"""FCPTS: the thresholds of all layers are learned together, so that blocks stay close at one sparsity (arXiv:2405.05808).

The masks are soft while thresholds are learned, so that the error of the blocks reaches every threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aerogel.layers.conv import Layer
from aerogel.methods.allocation.policy import AllocationMethod, Targets
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.model.trace import NON_BLOCK
from aerogel.numerics.allocation import Shares, corrected, erk, soft_mask, soft_share
from aerogel.options import Count, NonNegative, Positive
from aerogel.training.fit import Fit, fit
from aerogel.training.losses import normalized_mse

_WIDTHS = (0.1, 0.01)
"""Width of the soft masks at the first and the last step, as a share of the root mean square of a layer's weights."""
_TOLERANCE = 0.002
"""Distance from the sparsity from which on the penalty is doubled."""
_DOUBLINGS = 20
_LEAST, _MOST = 0.01, 0.99
"""Shares that layers start with at least and at most: where a mask is flat, nothing is learned."""


@dataclass(frozen=True)
class Fcpts(AllocationMethod):
    """Learns one magnitude threshold for each layer, all together, from the outputs of the blocks at the sparsity of all layers."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "gradients", "uncached"})

    power: NonNegative = 1.0
    """Power of the ERK rule that the thresholds start from."""
    steps: Count = 200
    """Optimiser steps."""
    batch: Count = 2
    """Calls in a step."""
    rate: Positive = 0.02
    """Peak learning rate of Adam for the logarithms of the thresholds."""
    penalty: Positive = 100.0
    """Weight of the squared distance from the sparsity at the start; doubled up to twenty times while that is missed by more than 0.002."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every step passes its calls through both models, and back through one."""
        return CostEstimate(model_tokens=4.0 * self.steps * self.batch * size.at_once + 4.0 * size.tokens)

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the shares below the learned thresholds, moved to meet the sparsity exactly."""
        start = erk({name: tuple(layer.weight.shape) for name, layer in targets.layers.items()}, sparsity, self.power)
        thresholds = Thresholds(targets.layers, start)
        watched = _watched(network, targets)
        penalty = [self.penalty]

        def loss(chosen: Sequence[int]) -> Tensor:
            weights = thresholds.weights()
            error = torch.stack([block_error(network, watched, weights, calls[number]) for number in chosen]).mean()
            return error + penalty[0] * (thresholds.sparsity() - sparsity).square()

        def before(step: int) -> None:
            first, last = _WIDTHS
            thresholds.width = first * (last / first) ** (step / max(1, self.steps - 1))
            if step % max(1, self.steps // _DOUBLINGS) == 0 and abs(float(thresholds.sparsity().detach()) - sparsity) > _TOLERANCE:
                penalty[0] *= 2

        how = Fit(self.steps, self.batch, self.rate, clip=0, check=self.steps + 1, optimizer="adam", keep="last")
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        fit(list(thresholds.logs.values()), loss, len(calls), how, generator, before)
        return corrected(thresholds.shares(), targets.sizes, sparsity)


@dataclass(eq=False)
class Thresholds:
    """One threshold for each layer: the exponential of a parameter, in units of the root mean square of the layer's weights."""

    layers: Mapping[str, Layer]
    start: Mapping[str, float]
    width: float = _WIDTHS[0]
    """Width of the soft masks, measured likewise."""
    unit: dict[str, Tensor] = field(init=False)
    logs: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.unit, self.logs = {}, {}
        for name, layer in self.layers.items():
            magnitude = layer.weight.detach().float().abs().flatten()
            self.unit[name] = magnitude.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            rank = round(min(max(self.start[name], _LEAST), _MOST) * (len(magnitude) - 1)) + 1
            relative = magnitude.kthvalue(rank).values / self.unit[name]
            self.logs[name] = nn.Parameter(relative.clamp(min=1e-4).log())

    def of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's weight in float32, its threshold and the width of its mask."""
        return self.layers[name].weight.detach().float(), self.unit[name] * self.logs[name].exp(), self.unit[name] * self.width

    def weights(self) -> dict[str, Tensor]:
        """Return the masked weights by full name."""
        found = {}
        for name, layer in self.layers.items():
            weight, threshold, width = self.of(name)
            found[f"{name}.weight"] = (weight * soft_mask(weight, threshold, width)).to(layer.weight.dtype)
        return found

    def sparsity(self) -> Tensor:
        """Return the share of zeros over all layers, with a derivative by every threshold."""
        sizes = {name: layer.weight.numel() for name, layer in self.layers.items()}
        zeros = torch.stack([size * soft_share(*self.of(name)) for name, size in sizes.items()])
        return zeros.sum() / sum(sizes.values())

    @torch.no_grad()
    def shares(self) -> Shares:
        """Return the share of each layer that is below its threshold; never all of it, and never nothing."""
        found = {}
        for name in self.layers:
            weight, threshold, _ = self.of(name)
            size = weight.numel()
            found[name] = min(max(float((weight.abs() < threshold).double().mean()), 0.5 / size), 1 - 1 / size)
        return found


def _watched(network: Network, targets: Targets) -> list[str]:
    """The blocks, and the model's own output where layers around the blocks are meant."""
    return [*network.blocks(), *([NON_BLOCK] if NON_BLOCK in targets.blocks.values() else [])]


def block_error(network: Network, blocks: Sequence[str], weights: Mapping[str, Tensor], call: Call) -> Tensor:
    """Return squared error over power of the original output, summed over blocks, with these weights in place of the model's own."""
    with torch.no_grad():
        wanted = _outputs(network, blocks, {}, call)
    given = _outputs(network, blocks, weights, call)
    return torch.stack([normalized_mse(output, target) for output, target in zip(given, wanted, strict=True)]).sum()


def _outputs(network: Network, blocks: Sequence[str], weights: Mapping[str, Tensor], call: Call) -> list[Tensor]:
    """Return what the blocks give in a forward, in the order they run; gradients reach the given weights only."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(tensors_in(output)[0].clone())

    fixed = {name: parameter.detach() for name, parameter in network.module.named_parameters() if name not in weights}
    with ExitStack() as stack:
        for name in blocks:
            if name != NON_BLOCK:
                stack.enter_context(temporary_hooks([network.module.get_submodule(name).register_forward_hook(see)]))
        output = functional_call(network.module, {**fixed, **weights}, call.args, call.kwargs)
    return [*seen, *([tensors_in(output)[0]] if NON_BLOCK in blocks else [])]
