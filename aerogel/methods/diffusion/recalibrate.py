"""Static ranges of inputs measured anew on the trajectory that the compressed network takes, a cache's included; ours.

Where modules are skipped, what comes after them gets other inputs than the ranges were made for, and the sampler goes another way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.layers.conv import with_inputs
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.observers import MovingAverage, RunningMinMax
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerStep, PerTensor, Scheme, TensorScheme
from aerogel.options import Share
from aerogel.runtime.feature_cache.replay import output_of, replays

_NOTHING = "no layer has inputs with static ranges; put activation_ranges or fsc before recalibrate"


@dataclass(frozen=True)
class Recalibrate(Method):
    """Measures the static input ranges of quantized layers again, on generations of the compressed model."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "teacher", "replays"})

    ranges: Literal["average", "minmax"] = "average"
    """Of the calls' extremes the moving average, or the widest."""
    momentum: Share = 0.95
    """Share that a range keeps of its average at each further call."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for static ranges."""
        if not any(map(_static, before.quantized.values())):
            yield _NOTHING

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Generate what was recorded again, under all policies that are on, and take its ranges; skipped steps of a layer keep theirs.

        Raises AerogelError where no layer has static inputs, and where calls do not replay.
        """
        layers = {name: part for name, part in network.module.named_modules() if isinstance(part, QuantLinear) and _static(part.scheme)}
        if not layers:
            raise AerogelError(_NOTHING)
        one = TensorScheme(next(iter(layers.values())).scheme.inputs.format, PerTensor(), symmetric=False)  # type: ignore[union-attr]
        seen: dict[str, dict[int, MovingAverage | RunningMinMax]] = defaultdict(lambda: defaultdict(partial(self._observer, one)))

        def see(name: str, x: Tensor) -> None:
            index = layers[name].timestep_index
            for row in dict.fromkeys(index.rows) if index is not None and _by_step(layers[name]) else (0,):
                seen[name][row].update(x)

        with capture_inputs(layers, see):
            for run in replays(network, Trajectories.of(network, calls)):
                run.finish(run.start(), lambda _, call: output_of(network.run(call)))
        for name, layer in layers.items():
            set_ranges(network, name, layer, {row: observer.grid() for row, observer in seen[name].items()})

    def _observer(self, scheme: TensorScheme) -> MovingAverage | RunningMinMax:
        return MovingAverage(scheme, 1 - self.momentum) if self.ranges == "average" else RunningMinMax(scheme)


def _static(scheme: Scheme) -> bool:
    inputs = scheme.inputs
    return inputs is not None and not inputs.dynamic and not inputs.symmetric and isinstance(inputs.granularity, PerTensor | PerStep)


def _by_step(layer: QuantLinear) -> bool:
    return layer.scheme.inputs is not None and isinstance(layer.scheme.inputs.granularity, PerStep)


def set_ranges(network: Network, name: str, layer: QuantLinear, found: dict[int, Grid]) -> None:
    """Put the layer's twin with new ranges in its place; rows that were not found stay."""
    before = layer.stored().input_grid
    assert before is not None, "its inputs are static"
    assert before.zero is not None, "they are asymmetric"
    assert layer.scheme.inputs is not None, "as above"
    scale, zero = before.scale.float().clone(), before.zero.clone()
    for row, grid in found.items():
        assert grid.zero is not None, "it was observed with a zero point"
        at = row if _by_step(layer) else ...
        scale[at], zero[at] = grid.scale.reshape(scale[at].shape), grid.zero.reshape(zero[at].shape).to(zero.dtype)
    dtype = network.stored_dtype or layer.get_buffer("weight_scale").dtype
    network.module.set_submodule(name, with_inputs(layer, layer.scheme.inputs, stored_grid(Grid(scale, zero), dtype), dtype))
