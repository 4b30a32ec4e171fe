"""BRECQ: the rounding of a block's weights is learned so that the block gives what it gave in float (arXiv:2102.05426).

Inputs come from the blocks before as they are by now, targets from the float network ("asymmetric" reconstruction), as Q-Diffusion
(arXiv:2302.04304) uses it on denoisers. O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer, matrix, quantized
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement, WeightMethod
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.rounding import rounding_grid
from aerogel.model.samples import Samples
from aerogel.model.trace import NON_BLOCK
from aerogel.model.units import captured
from aerogel.numerics.adaround import beta_at, first_alpha, hard_codes, hard_weight, soft_weight, undecided
from aerogel.numerics.scheme import Scheme
from aerogel.options import Count, CountOrZero, NonNegative, Positive, Share
from aerogel.training.fit import Fit, fit
from aerogel.training.reconstruction import error_with

Jobs = Mapping[str, tuple[Layer, Scheme]]


@dataclass(frozen=True)
class Brecq(WeightMethod):
    """Learns block by block whether to round each weight up or down, to reproduce the outputs of the original blocks."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "gradients", "teacher", "uncached"})

    scheme: Scheme | str = "W4A16_CHANNEL_ASYM"
    """Preset name of the weights' format; one with inputs measured at run time, such as W4A8, quantizes these too."""
    targets: tuple[str, ...] = ("Linear", "Conv2d")
    """Layers to act on: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""
    steps: CountOrZero = 20000
    """Optimiser steps a block."""
    batch: Count = 32
    """Samples in a step, drawn from all calls."""
    rate: Positive = 1e-3
    """Learning rate of Adam, constant."""
    rounding: NonNegative = 0.01
    """Weight of the term that makes every weight decide between up and down."""
    warmup: Share = 0.2
    """Share of the steps before that term begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for scheme in map(Scheme.parse, (self.scheme, *self.overrides.values())):
            if scheme.weights.format.kind == "float":
                raise AerogelError(
                    f"brecq learns to round to integers, and {scheme} stores floats; give an integer scheme, or use rtn for it"
                )
            if scheme.inputs is not None and not scheme.inputs.dynamic:
                raise AerogelError(f"brecq finds no static ranges of inputs, which {scheme} asks for; put activation_ranges after it")

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every step sees a batch; the rest are the first ranges, the teacher and what is handed on."""
        return CostEstimate(block_passes=4.0, fitted_samples=self.steps * self.batch)

    def compress(self, block: Block) -> None:
        """Learn the rounding of the block's layers together; layers outside of blocks are learned one by one."""
        jobs = self.assign(block)
        if block.name != NON_BLOCK:
            self._together(block, jobs)
            return
        for name, job in jobs.items():
            self._alone(block, name, job)

    def _together(self, block: Block, jobs: Jobs) -> None:
        if jobs:
            with cache_dequantized(block.module):
                self.learn(block, block.module, dict(jobs), block.samples())

    def _alone(self, block: Block, name: str, job: tuple[Layer, Scheme]) -> None:
        """A layer by itself, on its own inputs, against its own float outputs."""
        layer = job[0]
        seen, wanted = captured(block, layer, layer)
        samples = Samples([Call((x,)) for x in seen], wanted, block.network.placement)
        self.learn(block, layer, {name: job}, samples, alone=name)

    def learn(self, block: Block, module: nn.Module, jobs: Jobs, samples: Samples, alone: str = "") -> None:
        dtype = block.stored_dtype
        grids = {name: rounding_grid(layer, scheme, dtype) for name, (layer, scheme) in jobs.items()}
        alphas = {
            name: nn.Parameter(first_alpha(matrix(layer), grids[name], scheme.weights, block.kept_mask(name)))
            for name, (layer, scheme) in jobs.items()
        }

        def loss_of(rounded: Any, chosen: Sequence[int]) -> Tensor:
            weights = {}
            for name, (layer, scheme) in jobs.items():
                weight_OI = rounded(matrix(layer), alphas[name], grids[name], scheme.weights)
                weights["weight" if alone else f"{name}.weight"] = weight_OI.view_as(layer.weight).to(layer.weight.dtype)
            return error_with(module, weights, samples, chosen)

        beta: list[float | None] = [None]

        def loss(chosen: Sequence[int]) -> Tensor:
            error = loss_of(soft_weight, chosen)
            if beta[0] is None:
                return error
            return error + self.rounding * torch.stack([undecided(alpha, beta[0]) for alpha in alphas.values()]).sum()

        def before(step: int) -> None:
            beta[0] = beta_at(step, self.steps, self.warmup)

        how = Fit(self.steps, self.batch, self.rate, warmup=0, floor=1, clip=0, check=self.steps + 1, optimizer="adam", keep="last")
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        if self.steps:
            fit(list(alphas.values()), loss, len(samples), how, generator, before)
        reached: set[str] = set()
        parts = {"": module} if alone else {name: layer for name, (layer, _) in jobs.items()}
        with torch.no_grad(), capture_inputs(parts, lambda name, _: reached.add(name or alone)):
            batches = torch.arange(len(samples)).split(self.batch)
            error = sum(float(loss_of(hard_weight, batch.tolist())) * len(batch) for batch in batches) / len(samples)
        for name, (layer, scheme) in jobs.items():
            codes_OI = hard_codes(matrix(layer), alphas[name].detach(), grids[name], scheme.weights)
            block.replace(name, quantized(layer, scheme, codes_OI, grids[name], dtype=dtype))
            unseen = {} if name in reached else {"fallback": "rounded to nearest: no token reached it"}
            block.note(name, error=error / samples.power, **unseen)
