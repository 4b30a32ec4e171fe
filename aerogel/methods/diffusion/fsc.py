"""FSC, finite set calibration: inputs of the temporal path take few values, so each step gets its own exact range (arXiv:2311.16503).

T steps, C channels. In the temporal path an input at a step is a constant; its extremes are its range and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.methods.method import Method
from aerogel.model.calls import Call
from aerogel.model.clock import Clock, steps_of
from aerogel.model.hooks import watching
from aerogel.model.modules import QuantLinear, stored_grid
from aerogel.model.network import Network
from aerogel.model.quantized import set_clock
from aerogel.model.time_path import TemporalPath, check, find, sinusoids
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import grid_from_range
from aerogel.numerics.scheme import PerStep, TensorScheme


@dataclass(frozen=True)
class Fsc(Method):
    """Quantizes the inputs of the temporal path's linears to 8 bits with one range for each step of the sampler."""

    needs: ClassVar[frozenset[str]] = frozenset({"calls"})

    first: bool = True
    """Whether the embedder's first linear gets quantized inputs too; the sinusoid's range hardly changes from step to step."""

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Give the path's linears, whose weights are quantized already, per-step ranges; from now on the network follows a clock."""
        path, steps = find(network), steps_of(network.module, calls)
        check(network, path, calls[0])
        layers = self._layers(path)
        sinusoid_TC = sinusoids(network, path, calls[0], steps)
        scheduler = getattr(network.processor, "scheduler", None)
        clock = Clock(steps, "" if scheduler is None else f"{type(scheduler).__name__}")
        for name, layer in layers.items():  # in order: each sees what quantized inputs before it give
            low_T, high_T = _extremes(path, sinusoid_TC, name, layer, clock)
            twin = with_ranges(layer, low_T, high_T, network.stored_dtype)
            twin.clock = clock
            network.module.set_submodule(name, twin)
            path = find(network)
        set_clock(network.module, clock, [*path.embedders, *path.projections])

    def _layers(self, path: TemporalPath) -> dict[str, QuantLinear]:
        embedding = path.embedding_linears
        chosen = {**(embedding if self.first else dict(list(embedding.items())[1:])), **path.projections}
        layers = {name: layer for name, layer in chosen.items() if isinstance(layer, QuantLinear)}
        if not layers:
            raise AerogelError("no linear of the temporal path is quantized: put tiar, or rtn on its linears, before fsc")
        return layers


def with_ranges(layer: QuantLinear, low_T: Tensor, high_T: Tensor, dtype: torch.dtype | None) -> QuantLinear:
    """Return the same weights with static inputs of one range a step; `dtype` is that of stored scales."""
    inputs = TensorScheme(format_named("int8"), PerStep(len(low_T)), symmetric=False)
    stored = layer.stored()
    scheme = replace(layer.scheme, name=f"{layer.scheme}, inputs of {len(low_T)} steps", inputs=inputs)
    scale_dtype = dtype or layer._buffers["weight_scale"].dtype  # type: ignore[union-attr]
    grid = stored_grid(grid_from_range(low_T, high_T, inputs), scale_dtype)
    shape = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    shape.register_parameter("bias", layer.bias)
    return QuantLinear.from_codes(shape, scheme, stored.codes, stored.grid, stored.g_idx, grid, scale_dtype)


def _extremes(path: TemporalPath, sinusoid_TC: Tensor, name: str, layer: nn.Module, clock: Clock) -> tuple[Tensor, Tensor]:
    """The least and the largest number that goes into a layer at each step, (T,) each."""
    ranges: list[tuple[Tensor, Tensor]] = []

    def see(_: str, x: Tensor) -> None:
        ranges.append(torch.aminmax(x.float()))

    with watching({name: layer}, see):
        for row in range(len(sinusoid_TC)):
            with clock.at((row,)):
                path.features(sinusoid_TC[row : row + 1])
    low_T, high_T = (torch.stack(side) for side in zip(*ranges, strict=True))
    return low_T, high_T
