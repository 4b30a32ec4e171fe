"""GPTQ: rounds the columns of a weight one by one and compensates each error in the columns that follow (arXiv:2210.17323).

Letters in names: B problems of one shape, O outputs, I inputs, G groups of a row. A problem is one Hessian and the rows of all linear
layers that read these inputs: query, key and value are one. The Hessian is the mean of x x^T over all tokens, summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.kernels.malloc import release_pages
from aerogel.layers.conv import quantized
from aerogel.layers.linear import stored_grid
from aerogel.methods.base import CalibrationSize, CostEstimate, WeightMethod
from aerogel.model.block import Block
from aerogel.model.rounded_columns import ActOrder, round_problems
from aerogel.model.rounding import InputRange, has_static_inputs, output_error, relative_error, static_inputs
from aerogel.model.sequential import change_in_order
from aerogel.model.solutions import Problem, Share, Solution, batches, has_scales_of_rows, stack
from aerogel.model.statistics import InputStatistics
from aerogel.model.unseen_experts import borrow_input_ranges
from aerogel.numerics.quantize import Grid, dequantize
from aerogel.numerics.scheme import PerGroup, Scheme, TensorScheme
from aerogel.numerics.search import Observer, Shared, observe
from aerogel.options import NonNegative

_Jobs = Mapping[str, tuple[nn.Linear, Scheme]]


@dataclass(frozen=True)
class Gptq(WeightMethod):
    """Second-order rounding of weights: compensates the error of each column in the columns that follow."""

    shares_calls: ClassVar[bool] = True

    percdamp: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    """This times the mean of the Hessian's diagonal is added to the diagonal; increased tenfold if that is too little."""
    act_order: ActOrder = "static"
    """Order of columns: as they are (none), or largest inputs first, with groups as they are (static) or in the new order (group)."""
    observer: Observer | Literal["output"] = "output"
    """Search for ranges: minmax (cover every weight), mse (least squared error) or output (least uncompensated error)."""
    true_sequential: bool | None = None
    """Quantize linear layers in the order in which they run, with those before quantized; null: where one pass is enough."""
    max_activation_gb: NonNegative = 1.0
    """Gigabytes of activations that all calls may hold inside a block for that; above it, every group of layers takes a pass."""
    input_range: InputRange = "absmax"
    """Range of static inputs: absmax (extremes of all calls) or average (mean over the calls)."""

    @property
    def groups_in_activation_order(self) -> bool:
        """True where columns and groups are in one order."""
        return self.act_order == "group"

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """One pass for all groups of layers, where the activations of all calls fit into memory."""
        return CostEstimate(block_passes=1.1, activation_bytes=0.0 if self.true_sequential is False else self.max_activation_gb * 1e9)

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Quantize the block's linear layers."""
        jobs = self.assign(block)
        unseen: list[str] = []

        def quantize(names: Sequence[str], statistics: Mapping[str, InputStatistics]) -> None:
            unseen.extend(self._quantize(block, {name: jobs[name] for name in names}, statistics))

        change_in_order(
            block,
            {name: linear for name, (linear, _) in jobs.items()},
            quantize,
            ranges=any(has_static_inputs(scheme) for _, scheme in jobs.values()),
            true_sequential=self.true_sequential,
            max_activation_gb=self.max_activation_gb,
        )
        borrow_input_ranges(block, unseen)

    def _quantize(self, block: Block, jobs: _Jobs, statistics: Mapping[str, InputStatistics]) -> list[str]:
        """Quantize layers, all with the block as it is now; returns those with static inputs that no token reached."""
        problems: dict[tuple[object, ...], _Problem] = {}
        for name, (linear, scheme) in jobs.items():
            dtype = block.stored_dtype or linear.weight.dtype
            seen = statistics.get(name)
            alone = name if seen is None or not has_scales_of_rows(scheme.weights) else ""
            shared = block.shared_scale(name, scheme.weights)
            problem = problems.setdefault((seen, scheme, dtype, alone), _Problem({}, seen, scheme, dtype, shared))
            problem.linears[name] = linear
        for batch in batches(problems.values(), lambda problem: (problem.scheme, problem.dtype)):
            release_pages()  # freed in small pieces, memory stays with the process (measured: 290 MB more at the peak)
            self._solve(block, batch)
        return [name for name, (_, scheme) in jobs.items() if has_static_inputs(scheme) and name not in statistics]

    def _solve(self, block: Block, problems: Sequence[_Problem]) -> None:
        """Solve problems of one shape and scheme together and put the quantized layers in place."""
        scheme, dtype = problems[0].scheme.weights, problems[0].dtype
        fit = partial(self._fit, scheme=scheme, dtype=dtype)
        moves = self.act_order != "static" and isinstance(scheme.granularity, PerGroup) and scheme.scale_format == "float"
        weight_BOI = stack([problem.weight() for problem in problems])
        mine = Share.of(block.processes, weight_BOI, has_scales_of_rows(scheme))
        weight_BOI = weight_BOI[mine.problems, mine.rows]
        pruned = {block.full_name(name) for problem in problems for name in problem.linears} & block.network.pruned
        kept_BOI = weight_BOI != 0 if pruned else None  # what is not pruned has next to no zeros
        # Without a name here, the Hessians are freed as soon as they are factorised.
        solution = None if not len(weight_BOI) else round_problems(
            weight_BOI,
            stack([problem.hessian() for problem in problems[mine.problems]]),
            scheme,
            fit,
            moves,
            self.act_order,
            self.percdamp,
            kept_BOI,
            [problem.shared for problem in problems[mine.problems]],
        )  # fmt: skip
        self._store(block, problems, mine.together(solution, block.network.device))

    def _fit(self, weight: Tensor, importance: Tensor, shared: Shared | None, scheme: TensorScheme, dtype: torch.dtype) -> Grid:
        if self.observer == "output":
            return stored_grid(observe(weight, scheme, "mse", importance, shared), dtype)
        return stored_grid(observe(weight, scheme, self.observer, shared=shared), dtype)

    def _store(self, block: Block, problems: Sequence[_Problem], solution: Solution) -> None:
        """Put the quantized layers of solved problems in place and note how it went."""
        layers = {name: layer for index, problem in enumerate(problems) for name, layer in problem.solved(solution, index)}
        errors = block.processes.each({name: layer.error for name, layer in layers.items()})
        for name, layer in layers.items():
            scheme, seen, dtype = layer.problem.scheme, layer.problem.statistics, layer.problem.dtype
            inputs = static_inputs(scheme, seen, self.input_range, dtype)
            block.replace(name, quantized(layer.linear, scheme, layer.codes_OI, layer.grid, layer.g_idx, inputs, dtype))
            block.note(name, error=errors[name], damping=layer.damping, **layer.problem.fallback(layer.failed, "rounded to nearest"))


@dataclass(eq=False)
class _Problem(Problem):
    """Linear layers that read the same inputs and can be rounded as one weight."""

    scheme: Scheme
    dtype: torch.dtype
    """Of stored scales."""
    shared: Shared | None
    """The outer scale, or the grid, of the fused set that the layer is in; None for one of its own."""

    def solved(self, solution: Solution, index: int) -> Iterator[tuple[str, _Layer]]:
        """Yield the layers by name, each with its rows of a solution."""
        g_idx = None if solution.g_idx_BI is None else solution.g_idx_BI[index]
        for name, linear, rows in self.rows():
            assert isinstance(linear, nn.Linear), "GPTQ is given no others"
            grid = solution.grids[index]
            if len(self.linears) > 1:
                grid = Grid(grid.scale[rows], None if grid.zero is None else grid.zero[rows])
            damping, failed = float(solution.damping_B[index]), bool(solution.failed_B[index])
            loss = float(solution.loss_BO[index, rows].sum())
            yield name, _Layer(linear, self, solution.codes_BOI[index, rows], loss, grid, g_idx, damping, failed)


class _Layer(NamedTuple):
    """A linear layer with its quantized values."""

    linear: nn.Linear
    problem: _Problem
    codes_OI: Tensor
    loss: float
    """Squared error of its output, where the Hessian was factorised."""
    grid: Grid
    g_idx: Tensor | None
    damping: float
    failed: bool

    def error(self) -> float:
        """Relative squared error of its output."""
        seen = self.problem.statistics
        if seen is not None and not self.failed:
            return relative_error(self.loss, self.linear.weight, seen.moment())
        error_OI = self.linear.weight.float() - dequantize(self.codes_OI, self.grid, self.problem.scheme.weights, g_idx=self.g_idx)
        return output_error(error_OI, self.linear.weight, seen.moment() if seen else None)
