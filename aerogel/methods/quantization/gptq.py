"""GPTQ: rounds the columns of a weight one by one and compensates each error in the columns that follow (arXiv:2210.17323).

Letters in names: B problems of one shape, O outputs, I inputs, G groups of a row. A problem is one Hessian and the rows of all linear
layers that read these inputs: query, key and value are one. The Hessian is the mean of x x^T over all tokens, summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.kernels.malloc import release_pages
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.methods.base import CalibrationSize, CostEstimate, WeightMethod
from aerogel.model.block import Block
from aerogel.model.rounding import InputRange, has_static_inputs, output_error, relative_error, static_inputs
from aerogel.model.sequential import change_in_order
from aerogel.model.solutions import Problem, Share, Solution, batches, group_width, has_scales_of_rows, importance_of, row_grids, stack
from aerogel.model.statistics import InputStatistics
from aerogel.model.unseen_experts import borrow_input_ranges
from aerogel.numerics.feedback import feedback, round_columns
from aerogel.numerics.quantize import Grid, dequantize, grouped
from aerogel.numerics.scheme import PerGroup, Scheme, TensorScheme
from aerogel.numerics.search import Observer, Shared, observe
from aerogel.options import NonNegative

ActOrder = Literal["none", "static", "group"]
_Jobs = Mapping[str, tuple[nn.Linear, Scheme]]

_ROWS = 512
"""Rows of a Hessian that are reordered at once."""


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
        solution = None if not len(weight_BOI) else solve(
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
            block.replace(name, QuantLinear.from_codes(layer.linear, scheme, layer.codes_OI, layer.grid, layer.g_idx, inputs, dtype))
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


def solve(
    weight_BOI: Tensor,
    hessian_BII: Tensor,
    scheme: TensorScheme,
    fit: Callable[[Tensor, Tensor, Shared | None], Grid],
    moves: bool = False,
    act_order: ActOrder = "static",
    damping: float = 0.01,
    kept_BOI: Tensor | None = None,
    shared_B: Sequence[Shared | None] | None = None,
) -> Solution:
    """Round weights so that the outputs for inputs with these Hessians change little.

    `fit` makes a stored grid from weights laid out by `quantize.grouped`, the importance of their errors and what they share
    with others, if anything. With `moves` (groups only) the grid of a group is made when its turn comes, from weights that have taken
    the errors before it; otherwise grids are made from the weights as they are. Where `kept_BOI` is False, weights are pruned and stay
    zero.
    """
    columns = weight_BOI.shape[-1]
    as_is_BI = torch.arange(columns, device=weight_BOI.device).expand(len(weight_BOI), -1)
    width, size = group_width(scheme, columns), -(-columns // group_width(scheme, columns))
    order_BI = as_is_BI
    if act_order != "none":
        order_BI = hessian_BII.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    place_BI = order_BI.argsort(dim=-1)
    hessian_BII = _reordered(hessian_BII, order_BI)
    found = feedback(hessian_BII, damping)
    del hessian_BII
    if moves:
        blank = weight_BOI.new_zeros(*weight_BOI.shape[:2], size)
        grid, group_BI = Grid(blank, None if scheme.symmetric else blank.to(scheme.format.storage)), as_is_BI // width
    else:
        importance_BI = found.importance_BI.take_along_dim(place_BI, 1)
        grids = [
            fit(grouped(weight_OI, scheme.granularity), importance_of(importance_I, weight_OI, scheme), shared)
            for weight_OI, importance_I, shared in zip(weight_BOI, importance_BI, shared_B or [None] * len(weight_BOI), strict=True)
        ]
        grid, group_BI = row_grids(grids, scheme, weight_BOI.shape[1]), order_BI // width

    def fit_now(weight_BOn: Tensor, low: int, high: int) -> Grid:
        return fit(weight_BOn, found.importance_BI[:, None, low:high], None)

    ordered_BOI = _columns(weight_BOI, order_BI)
    if kept_BOI is not None:
        kept_BOI = _columns(kept_BOI, order_BI)
    rounded = round_columns(ordered_BOI, found, scheme.format, grid, group_BI, fit_now if moves else None, width, kept_BOI)
    if moves:
        grids = [Grid(grid.scale[b], None if grid.zero is None else grid.zero[b]) for b in range(len(weight_BOI))]
    g_idx_BI = place_BI // width if moves and act_order == "group" else None
    return Solution(_columns(rounded.codes_BOI, place_BI), rounded.loss_BO, grids, g_idx_BI, found.damping_B, found.failed_B)


def _columns(x_BOI: Tensor, order_BI: Tensor) -> Tensor:
    """Return the columns of each problem in its order; one problem after another takes a quarter of the time of one gather."""
    bytes_BOI = x_BOI if x_BOI.element_size() > 1 else x_BOI.view(torch.uint8)  # fp8 cannot be gathered
    return stack([x_OI.index_select(1, order_I) for x_OI, order_I in zip(bytes_BOI, order_BI, strict=True)]).view(x_BOI.dtype)


def _reordered(hessian_BII: Tensor, order_BI: Tensor) -> Tensor:
    """Return Hessians with rows and columns in the order of their problem."""
    made_BII = torch.empty_like(hessian_BII)
    for made_II, hessian_II, order_I in zip(made_BII, hessian_BII, order_BI, strict=True):
        for made_NI, rows_N in zip(made_II.split(_ROWS), order_I.split(_ROWS), strict=True):
            torch.index_select(hessian_II.index_select(0, rows_N), 1, order_I, out=made_NI)
    return made_BII
