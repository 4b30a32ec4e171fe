"""TIAR: the rounding of the whole temporal path is learned at once, on the temporal features of every step (arXiv:2311.16503).

T steps, O outputs, I inputs. Other than the released code, which draws minibatches of repeated steps, every step counts once and all
are in one batch: the path is small and needs no image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aerogel.errors import AerogelError
from aerogel.layers.conv import quantized
from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.rounding import rounding_grid
from aerogel.model.time_path import TemporalPath, check, find, sinusoids
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.adaround import beta_at, first_alpha, hard_codes, soft_weight, undecided
from aerogel.numerics.scheme import Scheme
from aerogel.options import CountOrZero, NonNegative, Positive, Share
from aerogel.training.fit import Fit, fit


@dataclass(frozen=True)
class Tiar(Method):
    """Rounds the weights of the temporal path so that the temporal features of every step are preserved."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "gradients", "time_path", "uncached"})

    scheme: Scheme | str = "W4A16_CHANNEL_ASYM"
    """Preset name of the weights' format; inputs of the path are another method's affair."""
    steps: CountOrZero = 5000
    """Optimiser steps, each over all time steps."""
    rate: Positive = 0.02
    """Learning rate of Adam, constant."""
    rounding: NonNegative = 0.01
    """Weight of the term that makes every weight decide between up and down."""
    warmup: Share = 0.2
    """Share of the steps before that term begins."""
    first: bool = True
    """Quantize the embedder's first linear layer too; the released code does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Scheme.parse(self.scheme).weights.format.kind == "float":
            raise AerogelError(
                f"tiar learns to round to integers, and {self.scheme} stores floats; give an integer scheme, or use rtn for it"
            )
        if Scheme.parse(self.scheme).inputs is not None:
            raise AerogelError(f"tiar learns weights only, and {self.scheme} asks for quantized inputs; put fsc after it")

    def stores(self, network: Network) -> dict[str, tuple[nn.Linear, Scheme]]:
        """The linear layers of the temporal path."""
        return {name: (linear, Scheme.parse(self.scheme)) for name, linear in self._linears(find(network)).items()}

    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Learn the rounding and put quantized linear layers into the path."""
        path, scheme = find(network), Scheme.parse(self.scheme)
        check(network, path, calls[0])
        sinusoid_TC = sinusoids(network, path, calls[0], Trajectories.of(network, calls).distinct_steps)
        dtype = network.stored_dtype or sinusoid_TC.dtype
        for name, twin in self.quantize(path.float(), sinusoid_TC.float(), scheme, dtype, network.pruned).items():
            twin.bias = network.module.get_submodule(name)._parameters["bias"]
            network.module.set_submodule(name, twin)

    def quantize(
        self, path: TemporalPath, sinusoid_TC: Tensor, scheme: Scheme, dtype: torch.dtype | None = None, pruned: Collection[str] = ()
    ) -> dict[str, QuantLinear]:
        """Return the path's linear layers, quantized, by full name; `dtype` is that of stored scales, zeros of `pruned` layers stay."""
        linears = self._linears(path)
        grids = {name: rounding_grid(linear, scheme, dtype) for name, linear in linears.items()}
        kept = {name: linears[name].weight != 0 for name in linears.keys() & pruned}
        alphas = {
            name: nn.Parameter(first_alpha(linear.weight, grids[name], scheme.weights, kept.get(name))) for name, linear in linears.items()
        }
        with torch.no_grad():
            wanted = path.features(sinusoid_TC)
        beta: list[float | None] = [None]

        def loss(_: Sequence[int]) -> Tensor:
            weights = {name: soft_weight(linear.weight, alphas[name], grids[name], scheme.weights) for name, linear in linears.items()}
            error = temporal_error(features_with(path, sinusoid_TC, weights), wanted)
            if beta[0] is None:
                return error
            return error + self.rounding * torch.stack([undecided(alpha, beta[0]) for alpha in alphas.values()]).sum()

        def before(step: int) -> None:
            beta[0] = beta_at(step, self.steps, self.warmup)

        how = Fit(self.steps, batch=1, rate=self.rate, warmup=0, floor=1, clip=0, check=self.steps, optimizer="adam", keep="last")
        fit(list(alphas.values()), loss, 1, how, torch.Generator().manual_seed(0), before)
        return {
            name: quantized(linear, scheme, hard_codes(linear.weight, alphas[name], grids[name], scheme.weights), grids[name], dtype=dtype)
            for name, linear in linears.items()
        }

    def _linears(self, path: TemporalPath) -> dict[str, nn.Linear]:
        embedding = path.embedding_linears
        chosen = embedding if self.first else dict(list(embedding.items())[1:])
        return {name: linear for name, linear in {**chosen, **path.projections}.items() if isinstance(linear, nn.Linear)}


def temporal_error(features: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Return sum over projections of the mean over steps of |F - F_wanted|^2, with F of shape (T, width)."""
    return torch.stack([(features[name] - feature).square().sum(-1).mean() for name, feature in wanted.items()]).sum()


def features_with(path: TemporalPath, sinusoid_TC: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the path with other weights, by full name of their linear; differentiable in them."""
    ((name, embedder),) = path.embedders.items()
    inside = {f"{full.removeprefix(f'{name}.')}.weight": weight for full, weight in weights.items() if full.startswith(f"{name}.")}
    activated = nn.functional.silu(functional_call(embedder, inside, (sinusoid_TC,)))
    return {
        full: functional_call(projection, {"weight": weights[full]} if full in weights else {}, (activated,))
        for full, projection in path.projections.items()
    }
