"""Reconstruction: the weights that pruning has left are fitted so that a layer, or the block, gives what it gave in the original model.

The objective and the choices are those of post-training sparsity as PTSBench orders them (arXiv:2412.07268). O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from aerogel.layers.conv import Layer, matrix
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement
from aerogel.methods.reconstruction.policy import ReconstructionMethod, original_of
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.samples import Samples
from aerogel.model.trace import NON_BLOCK
from aerogel.model.units import Unit, captured, routed, rows_of
from aerogel.numerics.sparsity import kept_like
from aerogel.options import Count, Positive
from aerogel.training.fit import Fit, History, fit
from aerogel.training.reconstruction import error_with


@dataclass(frozen=True)
class Reconstruct(ReconstructionMethod):
    """Fits the remaining weights and the biases of pruned layers to the outputs of the original model; zeros stay zero."""

    granularity: Literal["single", "layer", "block"] = "block"
    """Part whose output is matched: one layer, a layer with the norm and activation behind it, or the block (all its layers together)."""
    inputs: Literal["sparse", "dense"] = "sparse"
    """Inputs of that part: those that it gets in the pruned model, or those of the original model."""
    mask: Literal["static", "recomputed"] = "static"
    """Zeros: where pruning has put them, or recomputed in every step from magnitudes, as many in the same pattern."""
    steps: Count = 200
    """Optimiser steps of each part."""
    batch: Count = 8
    """Samples in a step, drawn from all calls."""
    rate: Positive = 1e-4
    """Peak learning rate of Adam, which rises for a twentieth of the steps and falls by a cosine."""

    @property
    def requires(self) -> frozenset[Requirement]:  # type: ignore[override]
        """Return what all reconstruction requires, and gradients; whole blocks with zeros that stay do without the original layers."""
        needed: set[Requirement] = {*super().requires, "gradients"}
        if self.granularity == "block" and self.mask == "static":
            needed.discard("teacher_layers")
        return frozenset(needed)

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every step sees a batch; further passes measure the loss eleven times, run the teacher, and hand on what comes out."""
        return CostEstimate(block_passes=15.0, fitted_samples=self.steps * self.batch)

    def compress(self, block: Block) -> None:
        """Fit the block's pruned layers together, or one after the other; layers around the blocks always one by one."""
        layers = self.pruned(block)
        if not layers:
            return
        if self.granularity == "block" and block.name != NON_BLOCK:
            fitted = [Fitted.of(block, name, layer, f"{name}.", self.mask) for name, layer in layers.items()]
            with cache_dequantized(block.module):
                self._fit(block, block.module, fitted, block.samples(original_inputs=self.inputs == "dense"))
            return
        rows = rows_of(block, layers)
        for name, row in rows.items():
            self._one(block, row if self.granularity != "single" else Unit((name,)), layers[name])
        for name in layers.keys() - rows.keys():
            block.note(name, fallback="not reconstructed: no token reached it")

    def _one(self, block: Block, unit: Unit, layer: Layer) -> None:
        """Fit one layer to what its row of modules gave in the original model; experts get the tokens they were given there."""
        dense_inputs, wanted = captured(original_of(block), *unit.ends(original_of(block)))
        inputs, origin = dense_inputs, "dense"
        if self.inputs == "sparse" and unit.layer not in routed(block):
            sparse_inputs, _ = captured(block, layer)
            if [x.shape for x in sparse_inputs] == [x.shape for x in dense_inputs]:
                inputs, origin = sparse_inputs, "sparse"
        if not inputs:
            block.note(unit.layer, fallback="not reconstructed: no token reached it in the original model")
            return
        samples = Samples([Call((x,)) for x in inputs], wanted, block.network.placement)
        fitted = Fitted.of(block, unit.layer, layer, "0.", self.mask)
        self._fit(block, unit.module(block), [fitted], samples, inputs=origin)

    def _fit(self, block: Block, module: nn.Module, fitted: Sequence[Fitted], samples: Samples, **facts: str) -> None:
        def error(weights: Mapping[str, Tensor], chosen: Sequence[int]) -> Tensor:
            return error_with(module, weights, samples, chosen) / samples.power

        def loss(chosen: Sequence[int]) -> Tensor:
            return error({name: value for one in fitted for name, value in one.values().items()}, chosen)

        how = Fit(self.steps, self.batch, self.rate, floor=0, clip=0, check=max(1, self.steps // 10), optimizer="adam")
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        before = _over_all(partial(error, {}), len(samples), self.batch)
        history: History = fit([parameter for one in fitted for parameter in one.parameters], loss, len(samples), how, generator)
        after = history.checks[history.best]
        for one in fitted:
            if after < before:
                one.put(block)
            stopped = {"fallback": history.warning} if history.warning else {}
            block.note(one.name, error=min(after, before), error_before=before, **facts, **stopped)


@torch.no_grad()
def _over_all(error: partial[Tensor], samples: int, batch: int) -> float:
    """Return the error over all samples with the weights as they are."""
    return sum(float(error(part.tolist())) * len(part) for part in torch.arange(samples).split(batch)) / samples


@dataclass(eq=False)
class Fitted:
    """A pruned layer whose remaining weights are fitted in float32."""

    name: str
    layer: Layer
    prefix: str
    """Start of the names of its parameters in the module that is run."""
    kept_OI: Tensor
    weight_OI: nn.Parameter
    bias_O: nn.Parameter | None
    recomputed: bool
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [self.weight_OI] if self.bias_O is None else [self.weight_OI, self.bias_O]

    @classmethod
    def of(cls, block: Block, name: str, layer: Layer, prefix: str, mask: Literal["static", "recomputed"]) -> Fitted:
        """Start from the weights as they are; where zeros may move, from the original values in their places."""
        kept_OI = block.kept_mask(name)
        assert kept_OI is not None, "it was pruned"
        weight_OI = matrix(layer).detach().float().clone()
        if mask == "recomputed":
            own: Layer = original_of(block).module.get_submodule(name)  # type: ignore[assignment]
            weight_OI = torch.where(kept_OI, weight_OI, matrix(own).detach().float())
        bias_O = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        return cls(name, layer, prefix, kept_OI, nn.Parameter(weight_OI), bias_O, mask == "recomputed")

    def mask(self) -> Tensor:
        """Return where weights are kept by now."""
        return kept_like(self.weight_OI.detach().abs(), self.kept_OI) if self.recomputed else self.kept_OI

    def values(self) -> dict[str, Tensor]:
        """Return the layer's parameters as they are by now, in their own dtypes, by name in the module that is run."""
        weight_OI = torch.where(self.mask(), self.weight_OI, 0.0)
        found = {f"{self.prefix}weight": weight_OI.view_as(self.layer.weight).to(self.layer.weight.dtype)}
        if self.bias_O is not None and self.layer.bias is not None:
            found[f"{self.prefix}bias"] = self.bias_O.to(self.layer.bias.dtype)
        return found

    @torch.no_grad()
    def put(self, block: Block) -> None:
        """Write what was fitted into the layer."""
        kept_OI = self.mask()
        for name, value in self.values().items():
            self.layer.get_parameter(name.removeprefix(self.prefix)).copy_(value)
        block.prune(self.name, kept_OI)
