"""Recipes that the search for sparsity compares: a criterion, shares of layers and an adjustment, from what methods declare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from aerogel.engine.search.candidates import Chosen, chosen
from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.methods.allocation.policy import AllocationMethod
from aerogel.methods.reconstruction.policy import ReconstructionMethod
from aerogel.methods.sparsity.policy import PruningMethod
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from aerogel.numerics.allocation import from_bytes
from aerogel.numerics.sparsity import zero_share
from aerogel.recipe import Recipe, Step, build

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
_OURS = ("sparsity", "pattern", "budget_bytes", "targets", "ignore")
"""Options that the budget and the model decide, the same for all candidates."""


@dataclass(frozen=True)
class Budget:
    """Zeros that are asked for: a share of the prunable weights, a pattern, or as many as leave so many bytes."""

    said: str
    share: float = 0.0
    """Share of zeros; of bytes it is known once the model is."""
    pattern: str = "unstructured"
    bytes: int | None = None

    @classmethod
    def of(cls, budget: float | str) -> Budget:
        """Read 0.5, 50%, 2:4 or 40MB; raises AerogelError for anything else."""
        said = str(budget).strip()
        if (found := re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", said)) and int(found[1]) < int(found[2]):
            return cls(said, 1 - int(found[1]) / int(found[2]), said)
        if (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)", said)) and float(found[1]) > 0:
            return cls(said, bytes=round(float(found[1]) * _UNITS[found[2]]))
        try:
            share = float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise AerogelError(
                f"budget {budget!r} says nothing about zeros; give their share between 0 and 1, such as 0.5 or 50%, a pattern N:M, which "
                "keeps N of every M inputs, such as 2:4, or the bytes that the pruned layers may take, such as 40MB"
            )
        return cls(said, share)

    @property
    def run(self) -> int:
        """Inputs in one run of the pattern; 1 without a pattern."""
        return 1 if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])

    def share_of(self, prunable: Prunable, dtype: torch.dtype | None) -> float:
        """Return the share of zeros; raises AerogelError for bytes that the layers cannot take."""
        if self.bytes is None:
            return self.share
        itemsizes = {name: (dtype or layer.weight.dtype).itemsize for name, layer in prunable.layers.items()}
        share = from_bytes(prunable.sizes, itemsizes, self.bytes)
        if share <= 0:
            raise AerogelError(f"budget {self.said}: the layers that can be pruned take no more as they are; give less")
        return share


@dataclass(frozen=True)
class Prunable:
    """The layers that every candidate prunes, by full name."""

    layers: Mapping[str, Layer]
    blocks: Mapping[str, str]
    """Names of the blocks that they are in."""
    ignore: tuple[str, ...]
    """Layers that methods would reach and are to leave dense."""

    @classmethod
    def of(cls, network: Network, run: int) -> Prunable:
        """Find the float linear layers and convolutions of the blocks; with runs of inputs, the linear layers that these fit.

        The head, embeddings and what else is around the blocks stay dense, unless a model has nothing but that. Raises AerogelError for a
        model in which there is nothing to prune.
        """
        found: dict[str, tuple[Layer, str]] = {}
        for block in blocks_of(network):
            for name, layer in block.linears(("Linear", "Conv2d"), ("lm_head",)).items():
                if isinstance(layer, Layer):
                    found[block.full_name(name)] = (layer, block.name)
        inside = {name for name, (_, block) in found.items() if block} or set(found)
        taken = {name for name in inside if run == 1 or _fits(found[name][0], run)}
        if not taken:
            what = "linear layer or convolution that is not quantized" if run == 1 else f"linear layer whose inputs are in runs of {run}"
            raise AerogelError(
                f"this {network.family.name} model has no {what} in its blocks, so there is nothing to prune; give another one"
            )
        return cls(
            {name: layer for name, (layer, _) in found.items() if name in taken},
            {name: block for name, (_, block) in found.items() if name in taken},
            tuple(name for name in found if name not in taken),
        )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each layer."""
        return {name: layer.weight.numel() for name, layer in self.layers.items()}

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(self.sizes.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of layers, as methods take them."""
        has_convolutions = any(isinstance(layer, nn.Conv2d) for layer in self.layers.values())
        return ("Linear", "Conv2d") if has_convolutions else ("Linear",)

    @property
    def options(self) -> dict[str, Any]:
        """The options by which a method acts on these layers and on no others."""
        return {"targets": self.targets, "ignore": ("lm_head", *self.ignore)}

    def zeros(self, network: Network) -> dict[str, float]:
        """Return the share of zeros of each layer in a copy of the model."""
        return {name: zero_share(network.module.get_submodule(name).weight) for name in self.layers}  # type: ignore[arg-type]

    def mean(self, shares: Mapping[str, float]) -> float:
        """Return the share of all weights together."""
        return sum(shares[name] * size for name, size in self.sizes.items()) / self.weights


def _fits(layer: Layer, run: int) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features % run == 0


class Candidate(NamedTuple):
    """Methods by name: a criterion, and what is done before and after it."""

    criterion: str
    allocation: str = ""
    """Empty: every layer gets the same share."""
    reconstruction: str = ""
    """Empty: the weights that stay are as they were, or as the criterion leaves them."""

    @property
    def name(self) -> str:
        """The methods in the order of the recipe."""
        return " + ".join(name for name in (self.allocation, self.criterion, self.reconstruction) if name)


class Recipes:
    """The methods of the three kinds that are tried, and the recipes made of them."""

    def __init__(self, only: Sequence[str], overrides: Iterable[str]) -> None:
        """Raises AerogelError for a method of another kind, and for options that are not to be set.

        Methods that train are tried where they are named, or an option of theirs is set.
        """
        self._tried: Chosen = chosen(_unfit, only, overrides)
        for name, (_, options) in self._tried.items():
            if ours := [option for option in _OURS if option in options]:
                raise AerogelError(f"{name}.{ours[0]} is decided by the budget and the model here, the same for all; leave it out")
        self.left_out: dict[str, str] = {}
        for name, (cls, options) in list(self._tried.items()):
            if name not in only and not options and "gradients" in build(cls, {}, f"method {name!r}").requires:
                self.left_out[name] = "it trains, which takes long; name it (--only) or set one of its options to try it"
                del self._tried[name]
        if not self.criteria:
            raise AerogelError("none of the methods says which weights become zero; name one that does too, such as magnitude")

    @property
    def criteria(self) -> list[str]:
        """Methods that say which weights of a layer become zero."""
        return self._of(PruningMethod)

    @property
    def allocations(self) -> list[str]:
        """Methods that give layers their shares."""
        return self._of(AllocationMethod)

    @property
    def reconstructions(self) -> list[str]:
        """Methods that adjust what is left."""
        return self._of(ReconstructionMethod)

    def _of(self, kind: type) -> list[str]:
        return [name for name, (cls, _) in self._tried.items() if issubclass(cls, kind)]

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The options that were set, by method."""
        return {name: dict(options) for name, (_, options) in self._tried.items()}

    def reach(self, criterion: str, prunable: Prunable, network: Network) -> set[str]:
        """Return the layers that a criterion can act on, of those that are to be pruned."""
        method = self._step(criterion, prunable.options).method
        assert isinstance(method, PruningMethod)
        return {block.full_name(name) for block in blocks_of(network) for name in method.targeted(block)} & set(prunable.layers)

    def recipe(self, candidate: Candidate, budget: Budget, share: float, prunable: Prunable) -> Recipe:
        """Return the recipe of a candidate; raises AerogelError for options that the methods refuse."""
        steps = []
        if candidate.allocation:
            steps.append(self._step(candidate.allocation, {**prunable.options, "sparsity": share}))
        own = {"sparsity": None if candidate.allocation else share, "pattern": budget.pattern}
        steps.append(self._step(candidate.criterion, {**prunable.options, **own}))
        if candidate.reconstruction:
            steps.append(self._step(candidate.reconstruction, prunable.options))
        return Recipe(f"{candidate.name} at {budget.said}", tuple(steps))

    def _step(self, name: str, ours: Mapping[str, Any]) -> Step:
        cls, options = self._tried[name]
        return Step(name, build(cls, {**options, **ours}, f"method {name!r}"))


def _unfit(cls: type) -> str:
    if issubclass(cls, PruningMethod | AllocationMethod | ReconstructionMethod):
        return ""
    return "neither prunes weights, nor shares zeros out over layers, nor adjusts what pruning leaves"
