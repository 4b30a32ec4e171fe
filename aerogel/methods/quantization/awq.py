"""AWQ: scales up the weights that read large inputs, so that rounding hurts them less, then clips ranges (arXiv:2306.00978).

Letters in names: O outputs, I inputs, C channels of an edge, G groups of a row, n columns of a group.

What a candidate costs is the squared error of the linear layers' own outputs over all calibration tokens. That needs the Hessian of
their inputs alone, tr(D M D^T) with D the weight's error: exact, for all batches at once, without running anything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from aerogel.layers.linear import stored_grid
from aerogel.layers.scaled_input import ScaledInput
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement, WeightMethod
from aerogel.model.block import Block
from aerogel.model.edges import Edge, fold, gather, spread
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.processes import Processes
from aerogel.model.rounding import InputRange, has_static_inputs, output_energy, output_error, round_to_nearest, static_inputs
from aerogel.model.statistics import InputStatistics, collect
from aerogel.model.unseen_experts import borrow_input_ranges
from aerogel.model.walk import blocks_of
from aerogel.numerics.quantize import Grid, fake_quantize, grouped, weight_grid
from aerogel.numerics.scheme import PerChannel, PerGroup, Scheme
from aerogel.numerics.search import Shared, least_error
from aerogel.options import Count, CountOrZero


class _Inputs(NamedTuple):
    """Inputs of a linear layer, in the scaling that holds at the moment."""

    moment_II: Tensor
    magnitude_I: Tensor
    """Mean of |x|."""

    @classmethod
    def of(cls, statistics: InputStatistics) -> _Inputs:
        """Return the measured statistics."""
        return cls(statistics.moment(), statistics.mean_magnitude())

    def divided(self, scale_I: Tensor) -> _Inputs:
        """The same inputs, divided by a scale."""
        return _Inputs(self.moment_II / (scale_I[:, None] * scale_I), self.magnitude_I / scale_I)


@dataclass(eq=False)
class _Job:
    """A linear to quantize and what is known about it."""

    linear: nn.Linear
    scheme: Scheme
    dtype: torch.dtype
    """Of stored scales."""
    clip: bool
    """True where its ranges are searched."""
    inputs: _Inputs | None = None
    """None when no token reached it."""
    shared: Shared | None = None
    """The outer scale, or the grid, of its fused set when all scales are found; None for one of its own."""

    def grid(self, weight_OI: Tensor, scale_I: Tensor) -> Grid:
        """A grid for the weight in this scaling: of all weights, or clipped as far as columns can be looked at one by one."""
        weights = self.scheme.weights
        if not self.clip or self.inputs is None or not isinstance(weights.granularity, PerGroup | PerChannel):
            return stored_grid(weight_grid(weight_OI, weights), self.dtype)
        energy_I = self.inputs.moment_II.diagonal() / scale_I.square()
        importance = grouped(energy_I[None], weights.granularity)
        # Rough, because only the cheapest of the scalings counts: the final grid is searched anew, and this is most of the time.
        return stored_grid(least_error(grouped(weight_OI, weights.granularity), weights, importance=importance, rough=True), self.dtype)

    def last_grid(self) -> Grid:
        """The grid for the weight as it is now."""
        if isinstance(self.shared, Grid):
            return self.shared
        if self.clip and self.inputs is not None:
            return clipped(self.linear.weight, self.scheme, self.inputs.moment_II, self.shared)
        return weight_grid(self.linear.weight, self.scheme.weights, self.shared)

    def cost(self, scale_I: Tensor) -> float:
        """Squared error of the output when the weight is rounded in this scaling."""
        if self.inputs is None:
            return 0.0
        scaled_OI = self.linear.weight.float() * scale_I
        error_OI = (fake_quantize(scaled_OI, self.grid(scaled_OI, scale_I), self.scheme.weights) - scaled_OI) / scale_I
        return output_energy(error_OI, self.inputs.moment_II, coarse=self.linear.weight.dtype == torch.bfloat16)


@dataclass(frozen=True)
class Awq(WeightMethod):
    """Activation-aware scaling and clipping, then rounding to nearest."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "edges", "uncached"})
    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "layers"
    shares_calls: ClassVar[bool] = True

    search_space: CountOrZero = 20
    """In how many steps exponents of the scale between 0 and 1 are told apart; about half of them are tried."""
    duo_scaling: bool = True
    """Scale columns whose weights are large anyway less."""
    clip: bool = True
    """Search ranges (least output error) after scaling; without it they cover every weight."""
    unclipped: tuple[str, ...] = ("*q_proj", "*k_proj", "*qkv_proj", "*to_q", "*to_k")
    """Layers whose ranges are not clipped: query and key, whose outputs are multiplied with each other."""
    unmapped: Literal["skip", "keep"] = "skip"
    """Linear layers that no edge feeds: left unscaled (skip), or divide their input at run time (keep), which only aerogel can open."""
    rounds: Count = 1
    """Rounds in which all scales are searched, each from where the last ended."""
    input_range: InputRange = "absmax"
    """Range of static inputs: absmax (extremes of all calls) or average (mean over the calls)."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """One more pass where inputs have static ranges, which are measured when all scales are found."""
        schemes = (self.scheme, *self.overrides.values())
        return CostEstimate(block_passes=3.0 if any(has_static_inputs(Scheme.parse(scheme)) for scheme in schemes) else 2.0)

    def remarks(self, network: Network) -> Iterator[str]:
        """Count the layers that no edge feeds."""
        layers = fed = 0
        for block in blocks_of(network):
            names = self.assign(block).keys()
            layers, fed = layers + len(names), fed + len(names & {sink for edge in block.edges() for sink in edge.sinks})
        if fed < layers:
            kept = "divide their inputs at run time" if self.unmapped == "keep" else "are rounded without a scale"
            yield f"{layers - fed} of {layers} linear layers are fed by no edge and {kept}"

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Scale, clip and quantize the block's linear layers."""
        jobs = {
            name: _Job(linear, scheme, block.stored_dtype or linear.weight.dtype, self._clips(block.full_name(name)))
            for name, (linear, scheme) in self.assign(block).items()
        }
        statistics = collect(block, jobs, moment=True, ranges=True)
        inputs = {seen: _Inputs.of(seen) for seen in dict.fromkeys(statistics.values())}
        for name, seen in statistics.items():
            jobs[name].inputs = inputs[seen]
        edges = block.edges()
        for _ in range(self.rounds):
            for edge in edges:
                self._scale_edge(block, edge, jobs)
        fed = {sink for edge in edges for sink in edge.sinks}
        unfed = [jobs[name] for name in jobs if name not in fed]
        kept = self._scale_inputs(unfed, block.processes) if self.unmapped == "keep" else {}
        ranges = self._ranges(block, jobs, kept)
        for name, job in jobs.items():
            job.shared = block.shared_scale(name, job.scheme.weights)
        place = block.network.placement
        found = block.processes.each({name: lambda job=job: place.take_back(job.last_grid()) for name, job in jobs.items()})  # type: ignore[misc]
        for name, job in jobs.items():
            self._finish(block, name, job, place.bring(found[name]), ranges.get(name), kept.get(job))
        borrow_input_ranges(block, [name for name, job in jobs.items() if has_static_inputs(job.scheme) and name not in ranges])

    def _scale_edge(self, block: Block, edge: Edge, jobs: dict[str, _Job]) -> None:
        """Find the scale of an edge's channels and move it there."""
        readers = [jobs[name] for name in edge.sinks if name in jobs and jobs[name].inputs is not None]
        if not readers:
            return
        scale_C = self._search(readers, partial(gather, edge), partial(spread, edge), block.processes)
        fold(block.module, edge, scale_C)
        _divide(readers, spread(edge, scale_C))

    def _scale_inputs(self, jobs: Iterable[_Job], processes: Processes) -> dict[_Job, Tensor]:
        """Find scales for linear layers that must divide their inputs themselves, and multiply their weights."""
        together: dict[int, list[_Job]] = {}
        for job in jobs:
            if job.inputs is not None:
                together.setdefault(id(job.inputs), []).append(job)
        kept = {}
        for readers in together.values():
            scale_I = self._search(readers, torch.clone, torch.clone, processes)
            for job in readers:
                job.linear.weight *= scale_I
                kept[job] = scale_I
            _divide(readers, scale_I)
        return kept

    def _ranges(self, block: Block, jobs: Mapping[str, _Job], kept: Mapping[_Job, Tensor]) -> dict[str, InputStatistics]:
        """Measure the ranges of static inputs, with all inputs divided by their scales."""
        static = [name for name, job in jobs.items() if has_static_inputs(job.scheme)]
        if not static:
            return {}
        for name, job in jobs.items():
            if job in kept:
                block.replace(name, ScaledInput(job.linear, kept[job]))
        read_by = {name: f"{name}.inner" if jobs[name] in kept else name for name in static}
        seen = collect(block, read_by.values(), ranges=True)
        return {name: seen[reader] for name, reader in read_by.items() if reader in seen}

    def _search(
        self, readers: Sequence[_Job], gather: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor], processes: Processes
    ) -> Tensor:
        """The scale_C, or ones, with which rounding the readers costs least; processes share the candidates."""
        magnitude_C = gather(torch.stack([job.inputs.magnitude_I for job in readers if job.inputs]).mean(0))
        weight_C = gather(_weight_magnitude(readers)) if self.duo_scaling else None

        def scale(step: int | None) -> Tensor:
            if step is None:
                return torch.ones_like(magnitude_C)
            return scale_of(magnitude_C, weight_C, min(max(step, 0), self.search_space) / self.search_space)

        def cost(step: int | None) -> float:
            scale_I = spread(scale(step))
            return sum(job.cost(scale_I) for job in readers)

        # Every other strength, then the neighbours of the best: the cost has one valley, as far as it has been seen.
        costs = processes.each({step: partial(cost, step) for step in (None, *range(0, self.search_space + 1, 2))})
        at = min(costs, key=lambda step: costs[step]) or 0
        costs |= processes.each({step: partial(cost, step) for step in (at - 1, at + 1)})
        return scale(min(costs, key=lambda step: costs[step]))

    def _clips(self, name: str) -> bool:
        return self.clip and not matches(name, self.unclipped)

    def _finish(self, block: Block, name: str, job: _Job, grid: Grid, seen: InputStatistics | None, scale_I: Tensor | None) -> None:
        """Round a linear to its grid and put it in place."""
        weight_OI = job.linear.weight
        inputs = static_inputs(job.scheme, seen, self.input_range, job.dtype)
        quantized = round_to_nearest(job.linear, job.scheme, grid, job.dtype, inputs)
        error_OI = weight_OI.float() - quantized.dequantized(torch.float32)
        facts = {} if job.inputs else {"fallback": "rounded to nearest: no token reached it"}
        error = output_error(error_OI, weight_OI, job.inputs.moment_II if job.inputs else None)
        del error_OI
        block.replace(name, quantized if scale_I is None else ScaledInput(quantized, scale_I))
        block.note(name, error=error, **facts)


def scale_of(magnitude_C: Tensor, weight_C: Tensor | None, strength: float) -> Tensor:
    """The scale of a channel: magnitude^strength, over weight^(1 - strength) where weights count too; centred on one."""
    scale_C = magnitude_C**strength
    if weight_C is not None:
        scale_C = scale_C / (weight_C ** (1 - strength) + 1e-4)
    scale_C = scale_C.clamp(min=1e-4)
    return scale_C / (scale_C.max() * scale_C.min()).sqrt()


def clipped(weight_OI: Tensor, scheme: Scheme, moment_II: Tensor, outer: Tensor | None = None) -> Grid:
    """The grid whose rounding changes the output of each group least; other granularities than groups and channels cover every weight."""
    match scheme.weights.granularity:
        case PerGroup(size):
            short = -len(moment_II) % size
            tiles = pad(moment_II, (0, short, 0, short)).unflatten(1, (-1, size)).unflatten(0, (-1, size))
            moment_Gnn = tiles.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        case PerChannel():
            moment_Gnn = moment_II[None]
        case _:
            return weight_grid(weight_OI, scheme.weights, outer)
    return least_error(grouped(weight_OI, scheme.weights.granularity), scheme.weights, moment_Gnn, outer=outer)


def _weight_magnitude(readers: Sequence[_Job]) -> Tensor:
    """Mean of |w| over all rows that read a column, each as a share of its group's largest."""
    shares = []
    for job in readers:
        magnitude_OI = job.linear.weight.float().abs()
        runs = grouped(magnitude_OI, job.scheme.weights.granularity if job.scheme.group else PerChannel())
        share = runs / (runs.amax(-1, keepdim=True) + 1e-6)
        shares.append(share.flatten(1)[:, : magnitude_OI.shape[1]])
    return torch.cat(shares).mean(0)


def _divide(readers: Sequence[_Job], scale_I: Tensor) -> None:
    """Let the readers know that their inputs are divided by a scale from now on; shared inputs stay shared."""
    divided: dict[int, _Inputs] = {}
    for job in readers:
        if job.inputs is not None:
            before = job.inputs
            job.inputs = divided.setdefault(id(before), before.divided(scale_I))
