"""Static ranges of inputs: found from a few samples, averaged over batches, then learned as step sizes (LSQ, arXiv:1902.08153).

The activation side of Q-Diffusion (arXiv:2302.04304): zero points stay, step sizes are learned block by block against the float network,
together with those of attention operands in the block where `attention_quant` stands before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from aerogel.layers.conv import with_inputs
from aerogel.layers.linear import QuantLinear, cache_dequantized, stored_grid
from aerogel.methods.base import Before, BlockMethod, CalibrationSize, CostEstimate, Requirement
from aerogel.model.block import Block
from aerogel.model.calls import tensors_in
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trace import NON_BLOCK
from aerogel.model.walk import blocks_of
from aerogel.numerics.formats import format_named
from aerogel.numerics.observers import MovingAverage, RunningMinMax, Searched
from aerogel.numerics.quantize import Grid, fake_quantize
from aerogel.numerics.scheme import PerTensor, Scheme, TensorScheme
from aerogel.options import Count, CountOrZero, Positive
from aerogel.training.fit import Fit, fit


@dataclass(frozen=True)
class ActivationRanges(BlockMethod):
    """Quantizes the inputs of quantized layers to static 8 bits with a zero point, and learns the step sizes."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "gradients", "teacher", "uncached"})

    targets: tuple[str, ...] = ("Linear", "Conv2d")
    """Quantized layers whose inputs are not, to act on: globs on full dotted names, `re:` patterns or class names."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave alone; wins over targets."""
    start: Literal["minmax", "average", "search"] = "search"
    """The first range: all extremes, the moving average of each call's extremes (0.95), or the least 2.4-norm error on some inputs."""
    searched: Count = 262144
    """Numbers of an input that a search looks at, drawn at random, as many from every call."""
    steps: CountOrZero = 5000
    """Optimiser steps a block; 0 keeps the first range."""
    batch: Count = 32
    """Samples in a step, drawn from all calls."""
    rate: Positive = 4e-4
    """Peak learning rate of Adam, relative to the step size; it falls to nothing along a cosine."""
    exponent: Positive = 2.4
    """Power of the error that is made small."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for quantized layers whose inputs are still in float."""
        if not self.requantized(network, before):
            yield "activation_ranges reaches no quantized layer with float inputs; put brecq, gptq or rtn before it, or check its targets"

    def requantized(self, network: Network, before: Before) -> dict[str, Scheme]:
        """Return the layers that get static inputs."""
        targeted = {block.full_name(name) for block in blocks_of(network) for name in block.linears(self.targets, self.ignore)}
        found = {name: scheme for name, scheme in before.quantized.items() if name in targeted and scheme.inputs is None}
        return {name: Scheme.of(scheme.weights, INPUTS) for name, scheme in found.items()}

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every step sees a batch; the rest are the first ranges, the teacher and what is handed on."""
        return CostEstimate(block_passes=4.0, fitted_samples=self.steps * self.batch)

    def compress(self, block: Block) -> None:
        """Find the ranges of the block's layers, then learn their step sizes together."""
        linears = block.linears(self.targets, self.ignore)
        layers = {name: layer for name, layer in linears.items() if isinstance(layer, QuantLinear) and layer.scheme.inputs is None}
        if not layers:
            return
        with cache_dequantized(block.module):
            grids = self._first(block, layers)
            if self.steps and block.name != NON_BLOCK:
                grids = self._learned(block, {name: layers[name] for name in grids}, grids)
        for name, layer in layers.items():
            if name not in grids:
                block.note(name, fallback="inputs not quantized: nothing reached it")
                continue
            dtype = block.stored_dtype or layer.get_buffer("weight_scale").dtype
            block.replace(name, with_inputs(layer, INPUTS, stored_grid(grids[name], dtype), dtype))

    @torch.no_grad()
    def _first(self, block: Block, layers: Mapping[str, QuantLinear]) -> dict[str, Grid]:
        share = max(1, self.searched // max(len(block.calls), 1))
        observers: dict[str, RunningMinMax | Searched] = {
            name: Searched(INPUTS, share) if self.start == "search"
            else MovingAverage(INPUTS, 0.05) if self.start == "average"
            else RunningMinMax(INPUTS)
            for name in layers
        }  # fmt: skip
        reached: set[str] = set()

        def see(name: str, x: Tensor) -> None:
            reached.add(name)
            observers[name].update(x)

        with capture_inputs(layers, see):
            for call in block.calls:
                block.run(call)
        return {name: observer.grid() for name, observer in observers.items() if name in reached}

    def _learned(self, block: Block, layers: Mapping[str, QuantLinear], grids: Mapping[str, Grid]) -> dict[str, Grid]:
        """The grids with the step sizes that make the block's output closest to the float network's."""
        samples = block.samples()
        # Logarithms: a step stays positive, and one learning rate suits all sizes.
        logs = {name: nn.Parameter(grid.scale.log()) for name, grid in grids.items()}
        others = {name: nn.Parameter(step_size.float().log()) for name, step_size in block.parameters.items()}

        def now(name: str) -> Grid:
            return grids[name]._replace(scale=logs[name].exp())

        def loss(chosen: Sequence[int]) -> Tensor:
            for name, log in others.items():
                block.parameters[name] = log.exp()
            errors = [
                share * power_error(block.module(*call.args, **call.kwargs), wanted, self.exponent)
                for call, wanted, share in samples.take(chosen)
            ]
            return torch.stack(errors).sum()

        how = Fit(self.steps, self.batch, self.rate, warmup=0, floor=0, clip=0, check=max(1, self.steps // 4), optimizer="adam")
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(partial(_quantized, now, name)).remove)
            history = fit(
                [*logs.values(), *others.values()], loss, len(samples), how, torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            )
        for name, log in others.items():
            block.parameters[name] = log.detach().exp()
            block.note(name.removeprefix(f"{block.name}."), step_size=float(block.parameters[name]))
        before, after = history.checks[0], history.checks[history.best]
        for name in layers:
            block.note(name, range_error=after, range_error_before=before)
        return {name: grid._replace(scale=logs[name].detach().exp()) for name, grid in grids.items()}


INPUTS = TensorScheme(format_named("int8"), PerTensor(), symmetric=False)
"""Quantization of inputs: 256 integer codes under one scale, with a zero point."""


def power_error(output: Any, wanted: Any, exponent: float) -> Tensor:
    """Return sum over channels of |error|^exponent, averaged over the rest, of each pair of tensors; images are (N, C, ...)."""
    pairs = zip(tensors_in(output), tensors_in(wanted), strict=True)
    parts = [(a.float() - b.float()).abs().pow(exponent).sum(1 if a.ndim == 4 else -1).mean() for a, b in pairs]
    return torch.stack(parts).sum()


def _quantized(now: Any, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return fake_quantize(args[0], now(name), INPUTS), *args[1:]
