"""FSC, finite set calibration: inputs of the temporal path take few values, so each step gets its own exact range (arXiv:2311.16503).

T steps, C channels. In the temporal path an input at a step is a constant; its extremes are its range and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.methods.method import Method
from aerogel.model.calls import Call
from aerogel.model.clock import Clock, steps_of
from aerogel.model.convs import with_inputs
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
        shared: tuple[Tensor, Tensor] | None = None  # by the projections, which all read one tensor
        for name, layer in layers.items():  # in order: each sees what quantized inputs before it give
            low_T, high_T = shared or _extremes(path, sinusoid_TC, name, layer, clock)
            shared = (low_T, high_T) if name in path.projections else None
            inputs = TensorScheme(format_named("int8"), PerStep(len(steps)), symmetric=False)
            dtype = network.stored_dtype or layer.get_buffer("weight_scale").dtype
            twin = with_inputs(layer, inputs, stored_grid(grid_from_range(low_T, high_T, inputs), dtype), dtype)
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
