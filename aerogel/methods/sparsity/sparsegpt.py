"""SparseGPT: prunes column by column and compensates each error in the columns that follow (arXiv:2301.00774).

Letters in names: B problems of one shape, O outputs, I inputs, n columns that are chosen together. A problem is one Hessian and the rows of
all linear layers that read these inputs. The Hessian is the mean of x x^T over all tokens, summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from aerogel.kernels.malloc import release_pages
from aerogel.layers.conv import Layer, matrix, quantized
from aerogel.layers.linear import stored_grid
from aerogel.methods.base import CalibrationSize, CostEstimate, wide
from aerogel.methods.sparsity.policy import PruningMethod
from aerogel.model.block import Block
from aerogel.model.rounded_columns import round_problems
from aerogel.model.rounding import has_static_inputs, output_error, relative_error, static_inputs
from aerogel.model.sequential import change_in_order
from aerogel.model.solutions import Problem, Share, Solution, batches, group_width, has_scales_of_rows, importance_of, row_grids, stack
from aerogel.model.statistics import InputStatistics
from aerogel.model.unseen_experts import borrow_input_ranges
from aerogel.numerics.feedback import Choice, Feedback, feedback, fits_on_the_way, loss_of, prune_and_round_columns, prune_columns
from aerogel.numerics.quantize import Grid, dequantize, grouped
from aerogel.numerics.scheme import PerGroup, Scheme, TensorScheme
from aerogel.numerics.search import Shared, observe
from aerogel.numerics.sparsity import kept_by_count, kept_by_pattern, zero_share
from aerogel.options import Count, NonNegative


@dataclass(frozen=True)
class Sparsegpt(PruningMethod):
    """Sets weights to zero that cost the output least, and compensates each in the columns that follow (arXiv:2301.00774)."""

    shares_calls: ClassVar[bool] = True
    prunes_blocks: ClassVar[bool] = False  # a column is pruned when its turn comes, by scores that no later column of a block has yet

    block_size: Count = 128
    """Columns whose zeros are chosen together when their turn comes; with an N:M pattern these are M columns."""
    percdamp: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    """This times the mean of the Hessian's diagonal is added to the diagonal; increased tenfold if that is too little."""
    scheme: Scheme | str | None = None
    """Number format of the weights that stay, to which they are rounded in the same pass, for example W4A16_G64; null: they stay floats."""
    act_order: Literal["none", "static"] = "static"
    """Order in which weights get their number format: as they are pruned, in one loop (none), or largest inputs first (static)."""
    true_sequential: bool | None = None
    """Prune linear layers in the order in which they run, with those before pruned; null: where one pass is enough."""
    max_activation_gb: NonNegative = 1.0
    """Gigabytes of activations that all calls may hold inside a block for that; above it, every group of layers takes a pass."""

    @property
    def quantizes(self) -> bool:
        """True where the weights that stay get a number format."""
        return self.scheme is not None

    def targeted(self, block: Block) -> dict[str, Any]:
        """Return the block's float layers that it acts on: groups of a convolution would each have a Hessian of their own."""
        return {name: layer for name, layer in super().targeted(block).items() if getattr(layer, "groups", 1) == 1}

    def assign(self, block: Block) -> dict[str, tuple[Any, Scheme]]:
        """Return the block's float layers that are quantized too: name relative to the block -> (layer, scheme)."""
        if self.scheme is None:
            return {}
        scheme = Scheme.parse(self.scheme)
        return wide({name: (layer, scheme) for name, layer in self.targeted(block).items()}, block)

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """One pass for all groups of layers, where the activations of all calls fit into memory."""
        return CostEstimate(block_passes=1.1, activation_bytes=0.0 if self.true_sequential is False else self.max_activation_gb * 1e9)

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Prune the block's layers."""
        shares, schemes = self.shares(block), {name: scheme for name, (_, scheme) in self.assign(block).items()}
        linears = {name: layer for name, layer in self.targeted(block).items() if name in shares or name in schemes}
        unseen: list[str] = []

        def prune(names: Sequence[str], statistics: Mapping[str, InputStatistics]) -> None:
            for batch in self._batches(block, {name: linears[name] for name in names}, shares, schemes, statistics):
                release_pages()  # freed in small pieces, memory stays with the process, as in GPTQ
                self._solve(block, batch)
            unseen.extend(name for name in names if name in schemes and has_static_inputs(schemes[name]) and name not in statistics)

        change_in_order(
            block,
            linears,
            prune,
            ranges=any(map(has_static_inputs, schemes.values())),
            true_sequential=self.true_sequential,
            max_activation_gb=self.max_activation_gb,
        )
        borrow_input_ranges(block, unseen)

    def _batches(
        self,
        block: Block,
        linears: Mapping[str, Layer],
        shares: Mapping[str, float],
        schemes: Mapping[str, Scheme],
        statistics: Mapping[str, InputStatistics],
    ) -> Iterator[list[_Problem]]:
        """Yield problems of one shape and scheme together."""
        problems: dict[tuple[object, ...], _Problem] = {}
        for name, linear in linears.items():
            scheme, seen, dtype = schemes.get(name), statistics.get(name), block.stored_dtype or linear.weight.dtype
            alone = name if seen is None or (scheme is not None and not has_scales_of_rows(scheme.weights)) else ""
            shared = None if scheme is None else block.shared_scale(name, scheme.weights)
            problem = problems.setdefault((seen, scheme, dtype, alone), _Problem({}, seen, {}, scheme, dtype, shared))
            problem.linears[name], problem.shares[name] = linear, shares.get(name, 0.0)
        yield from batches(problems.values(), lambda problem: (problem.scheme, problem.dtype))

    def _solve(self, block: Block, problems: Sequence[_Problem]) -> None:
        """Solve problems of one shape and scheme together and put the results in place."""
        scheme = problems[0].scheme
        weight_BOI = stack([problem.weight() for problem in problems])
        apart = self.runs is not None and (scheme is None or has_scales_of_rows(scheme.weights))
        mine = Share.of(block.processes, weight_BOI, apart)
        here, weight_BOI = problems[mine.problems], weight_BOI[mine.problems, mine.rows]
        pruned = {block.full_name(name) for problem in problems for name in problem.linears} & block.network.pruned
        kept_BOI = weight_BOI != 0 if pruned else None  # what is not pruned has next to no zeros
        choose = pattern(*self.runs) if self.runs is not None else smallest_of([problem.parts() for problem in here])
        solution = None if not len(weight_BOI) else solve(
            weight_BOI,
            stack([problem.hessian() for problem in here]),
            Choice(choose, self.block_size if self.runs is None else self.runs[1]),
            self.percdamp,
            kept_BOI,
            None if scheme is None else Rounding(scheme.weights, problems[0].dtype, [problem.shared for problem in here], self.act_order),
        )  # fmt: skip
        self._store(block, problems, mine.together(solution, block.network.device))

    def _store(self, block: Block, problems: Sequence[_Problem], solution: Solution) -> None:
        """Put the pruned layers of solved problems in place and note how it went."""
        layers = {name: layer for index, problem in enumerate(problems) for name, layer in problem.solved(solution, index)}
        errors = block.processes.each({name: layer.error for name, layer in layers.items()})
        for name, layer in layers.items():
            scheme, seen, dtype = layer.problem.scheme, layer.problem.statistics, layer.problem.dtype
            matrix(layer.linear).copy_(layer.weight_OI)
            block.prune(name, layer.weight_OI != 0)
            sparsity = zero_share(layer.linear.weight)
            if scheme is not None and layer.grid is not None:
                inputs = static_inputs(scheme, seen, "absmax", dtype)
                block.replace(name, quantized(layer.linear, scheme, layer.values_OI, layer.grid, None, inputs, dtype))
            block.note(
                name,
                sparsity=sparsity,
                error=errors[name],
                error_of="weights" if seen is None else "outputs",
                damping=layer.damping,
                **layer.problem.fallback(layer.failed, "pruned by magnitude"),
            )


@dataclass(eq=False)
class _Problem(Problem):
    """Linear layers that read the same inputs and can be pruned as one weight."""

    shares: dict[str, float]
    """Share of zeros of each layer."""
    scheme: Scheme | None
    dtype: torch.dtype
    """Of stored scales."""
    shared: Shared | None
    """The outer scale, or the grid, of the fused set that the layer is in; None for one of its own."""

    def parts(self) -> list[tuple[slice, float]]:
        """The rows of each layer and its share of zeros."""
        return [(rows, self.shares[name]) for name, _, rows in self.rows()]

    def solved(self, solution: Solution, index: int) -> Iterator[tuple[str, _Layer]]:
        """Yield the layers by name, each with its rows of a solution."""
        for name, linear, rows in self.rows():
            grid = solution.grids[index] if solution.grids else None
            if grid is not None and len(self.linears) > 1:
                grid = grid._replace(scale=grid.scale[rows], zero=None if grid.zero is None else grid.zero[rows])
            values_OI = solution.codes_BOI[index, rows]
            weight_OI = values_OI if grid is None or self.scheme is None else dequantize(values_OI, grid, self.scheme.weights)
            loss, damping = float(solution.loss_BO[index, rows].sum()), float(solution.damping_B[index])
            yield name, _Layer(linear, self, values_OI, weight_OI, loss, grid, damping, bool(solution.failed_B[index]))


class _Layer(NamedTuple):
    """A linear layer with its new weights."""

    linear: Layer
    problem: _Problem
    values_OI: Tensor
    """Weights, or their codes on the grid where they are quantized."""
    weight_OI: Tensor
    loss: float
    """Squared error of its output, where the Hessian was factorised."""
    grid: Any
    damping: float
    failed: bool

    def error(self) -> float:
        """Relative squared error of its output."""
        seen, weight_OI = self.problem.statistics, matrix(self.linear)
        if seen is not None and not self.failed:
            return relative_error(self.loss, weight_OI, seen.moment())
        return output_error(weight_OI.float() - self.weight_OI, weight_OI, seen.moment() if seen else None)


class Rounding(NamedTuple):
    """Rounding of the weights that stay."""

    scheme: TensorScheme
    dtype: torch.dtype
    """Of stored scales."""
    shared_B: Sequence[Shared | None]
    """The outer scale, or the grid, that each problem shares with others."""
    act_order: Literal["none", "static"] = "static"


def solve(
    weight_BOI: Tensor,
    hessian_BII: Tensor,
    choice: Choice,
    damping: float = 0.01,
    kept_BOI: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Solution:
    """Set weights to zero, and round the others where that is asked for, so that outputs for inputs with these Hessians change little.

    Weights of inputs that were always zero go first. Where `kept_BOI` is False, weights are pruned already and stay zero.
    """
    dead_BI = hessian_BII.diagonal(dim1=-2, dim2=-1) <= 0
    found = feedback(hessian_BII, damping)
    dead_BI &= ~found.failed_B[:, None]  # without a Hessian, magnitudes decide

    def choose(score_BOn: Tensor, low: int, high: int) -> Tensor:
        return choice.choose(score_BOn.masked_fill(dead_BI[:, None, low:high], 0), low, high)

    choice_of_living = Choice(choose, choice.every)
    if rounding is not None and rounding.act_order == "none":
        return _in_one_loop(weight_BOI, found, choice_of_living, kept_BOI, rounding)
    pruned = prune_columns(weight_BOI, found, choice_of_living, kept_BOI)
    if rounding is None:
        return Solution(pruned.weight_BOI, pruned.loss_BO, [], None, found.damping_B, found.failed_B)

    def fit(weight: Tensor, importance: Tensor, shared: Shared | None) -> Grid:
        return stored_grid(observe(weight, rounding.scheme, "mse", importance, shared), rounding.dtype)

    rounded = round_problems(
        pruned.weight_BOI, hessian_BII, rounding.scheme, fit, damping=damping, kept_BOI=pruned.kept_BOI, shared_B=rounding.shared_B
    )
    values_BOI = stack([dequantize(codes, grid, rounding.scheme) for codes, grid in zip(rounded.codes_BOI, rounded.grids, strict=True)])
    return rounded._replace(loss_BO=loss_of(weight_BOI - values_BOI, found))


def _in_one_loop(weight_BOI: Tensor, found: Feedback, choice: Choice, kept_BOI: Tensor | None, rounding: Rounding) -> Solution:
    """Round each weight that stays when its column is pruned, as the code of the paper does.

    The grid of a group is made when its turn comes, from the weights that stay; other grids are made from the weights before any is pruned.
    """
    columns, scheme = weight_BOI.shape[-1], rounding.scheme
    width = group_width(scheme, columns)
    group_BI = (torch.arange(columns, device=weight_BOI.device) // width).expand(len(weight_BOI), -1)
    if isinstance(scheme.granularity, PerGroup) and scheme.scale_format == "float" and fits_on_the_way(choice, width):
        blank = weight_BOI.new_zeros(*weight_BOI.shape[:2], -(-columns // width))
        grid = Grid(blank, None if scheme.symmetric else blank.to(scheme.format.storage))

        def fit(weight_BOn: Tensor, low: int, high: int) -> Grid:
            return stored_grid(observe(weight_BOn, scheme, "mse", found.importance_BI[:, None, low:high]), rounding.dtype)

        pruned = prune_and_round_columns(weight_BOI, found, choice, scheme.format, grid, group_BI, fit=fit, group=width, kept_BOI=kept_BOI)
        grids = [Grid(grid.scale[b], None if grid.zero is None else grid.zero[b]) for b in range(len(weight_BOI))]
    else:
        grids = [
            stored_grid(
                observe(grouped(weight_OI, scheme.granularity), scheme, "mse", importance_of(importance_I, weight_OI, scheme), shared),
                rounding.dtype,
            )
            for weight_OI, importance_I, shared in zip(weight_BOI, found.importance_BI, rounding.shared_B, strict=True)
        ]
        grid = row_grids(grids, scheme, weight_BOI.shape[1])
        pruned = prune_and_round_columns(weight_BOI, found, choice, scheme.format, grid, group_BI, kept_BOI=kept_BOI)
    return Solution(pruned.weight_BOI, pruned.loss_BO, grids, None, found.damping_B, found.failed_B)


def pattern(kept: int, of: int) -> Callable[[Tensor, int, int], Tensor]:
    """Return the choice of the `kept` largest scores among these columns of each row."""
    return lambda score_BOn, low, high: kept_by_pattern(score_BOn, kept, of)


def smallest_of(parts_B: Sequence[Sequence[tuple[slice, float]]]) -> Callable[[Tensor, int, int], Tensor]:
    """Return the choice of a share of the scores of each layer among these columns, with all its rows together.

    Shares of columns are rounded so that those of the whole layer add up to its share.
    """

    def choose(score_BOn: Tensor, low: int, high: int) -> Tensor:
        kept_BOn = torch.ones_like(score_BOn, dtype=torch.bool)
        for problem, parts in enumerate(parts_B):
            for rows, share in parts:
                score_On = score_BOn[problem, rows]
                count = round(share * len(score_On) * high) - round(share * len(score_On) * low)
                kept_BOn[problem, rows] = kept_by_count(score_On, count)
        return kept_BOn

    return choose
