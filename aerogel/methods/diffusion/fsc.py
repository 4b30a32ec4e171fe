"""FSC, finite set calibration: inputs of the temporal path take few values, so each step gets its own exact range (arXiv:2311.16503).

T steps, C channels. In the temporal path an input at a step is a constant; its extremes are its range and nothing is estimated. Elsewhere
(the released code does it to every layer) a step's range is the moving average of its calls' extremes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import with_inputs
from aerogel.layers.linear import QuantLinear, cache_dequantized, set_timestep_index, stored_grid
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.time_path import TemporalPath, check, find, sinusoids
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.formats import format_named
from aerogel.numerics.observers import MovingAverage
from aerogel.numerics.quantize import Grid, grid_from_range
from aerogel.numerics.scheme import PerStep, PerTensor, Scheme, TensorScheme
from aerogel.options import Share

_UNQUANTIZED = "no layer of the temporal path is quantized: put tiar, or rtn on its layers, before fsc"


@dataclass(frozen=True)
class Fsc(Method):
    """Quantizes the inputs of the temporal path, or of all layers, to 8 bits with one range per sampling step."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "time_path", "uncached"})

    scope: Literal["path", "all"] = "path"
    """Whose inputs: the temporal path's, or also those of every other quantized layer whose inputs are still in float."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave alone: globs on full dotted names, `re:` patterns or class names."""
    momentum: Share = 0.95
    """Share that a range outside of the path keeps of its average at each further call."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for quantized layers whose inputs are still in float."""
        if network.time is not None and not self.requantized(network, before):
            yield _UNQUANTIZED

    def requantized(self, network: Network, before: Before) -> dict[str, Scheme]:
        """Return the layers that get a range for each step."""
        path, ignore, layer = find(network), network.expand_patterns(self.ignore), network.module.get_submodule
        within = {*path.embedding_linears, *path.projections}
        inputs = _inputs(before.size.steps)
        return {
            name: Scheme.of(scheme.weights, inputs)
            for name, scheme in before.quantized.items()
            if scheme.inputs is None and (self.scope == "all" or name in within) and not matches(name, ignore, layer(name))
        }

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Give layers whose weights are quantized already per-step ranges; from now on the model has a timestep index."""
        path, steps = find(network), Trajectories.of(network, calls).distinct_steps
        check(network, path, calls[0])
        layers = self._layers(network)
        within = {name: layers.pop(name) for name in (*path.embedding_linears, *path.projections) if name in layers}
        if not within and not (layers and self.scope == "all"):
            raise AerogelError(_UNQUANTIZED)
        sinusoid_TC = sinusoids(network, path, calls[0], steps)
        scheduler = getattr(network.processor, "scheduler", None)
        index = TimestepIndex(steps, "" if scheduler is None else f"{type(scheduler).__name__}")
        index.set_pipeline(network.processor)
        shared: tuple[Tensor, Tensor] | None = None  # by the projections, which all read one tensor
        for name, layer in within.items():  # in order: each sees what quantized inputs before it give
            low_T, high_T = shared or _extremes(path, sinusoid_TC, name, layer, index)
            shared = (low_T, high_T) if name in path.projections else None
            _give(network, name, layer, grid_from_range(low_T, high_T, _inputs(len(index.steps))), index)
            path = find(network)
        set_timestep_index(network.module, index, [*path.embedders, *path.projections])
        if self.scope == "all":
            self._rest(network, calls, index, layers)

    def _layers(self, network: Network) -> dict[str, QuantLinear]:
        """The layers with float inputs, by full name, that get a range at each step."""
        ignore = network.expand_patterns(self.ignore)
        coded = {name: part for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}
        return {name: part for name, part in coded.items() if part.scheme.inputs is None and not matches(name, ignore, part)}

    def _rest(self, network: Network, calls: Sequence[Call], index: TimestepIndex, layers: dict[str, QuantLinear]) -> None:
        """Ranges of layers outside of the path, all seen in one pass."""
        one = TensorScheme(format_named("int8"), PerTensor(), symmetric=False)
        seen: dict[str, dict[int, MovingAverage]] = defaultdict(lambda: defaultdict(partial(MovingAverage, one, 1 - self.momentum)))

        def see(name: str, x: Tensor) -> None:
            for row in dict.fromkeys(index.rows):
                seen[name][row].update(x[[at == row for at in index.rows]] if len(set(index.rows)) > 1 else x)

        with capture_inputs(layers, see), cache_dequantized(network.module):
            for call in calls:
                network.run(call)
        if unseen := [name for name in layers if len(seen[name]) < len(index.steps)]:
            raise AerogelError(f"{unseen[0]} was not reached at every step; calibrate with calls that do, or leave it out with `ignore`")
        for name, layer in layers.items():
            grids = [seen[name][row].grid() for row in range(len(index.steps))]
            zeros = [grid.zero for grid in grids if grid.zero is not None]
            _give(network, name, layer, Grid(torch.stack([grid.scale for grid in grids]), torch.stack(zeros)), index)


def _inputs(steps: int) -> TensorScheme:
    return TensorScheme(format_named("int8"), PerStep(steps), symmetric=False)


def _give(network: Network, name: str, layer: QuantLinear, grid: Grid, index: TimestepIndex) -> None:
    """Put the layer's twin with inputs on this grid in its place."""
    dtype = network.stored_dtype or layer.get_buffer("weight_scale").dtype
    twin = with_inputs(layer, _inputs(len(index.steps)), stored_grid(grid, dtype), dtype)
    twin.timestep_index = index
    network.module.set_submodule(name, twin)


def _extremes(path: TemporalPath, sinusoid_TC: Tensor, name: str, layer: nn.Module, index: TimestepIndex) -> tuple[Tensor, Tensor]:
    """The least and the largest number that goes into a layer at each step, (T,) each."""
    ranges: list[tuple[Tensor, Tensor]] = []

    def see(_: str, x: Tensor) -> None:
        ranges.append(torch.aminmax(x.float()))

    with capture_inputs({name: layer}, see):
        for row in range(len(sinusoid_TC)):
            with index.at((row,)):
                path.features(sinusoid_TC[row : row + 1])
    low_T, high_T = (torch.stack(side) for side in zip(*ranges, strict=True))
    return low_T, high_T
