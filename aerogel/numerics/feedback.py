"""Rounding or pruning column by column, each error compensated in the columns that follow: the core of GPTQ (arXiv:2210.17323).

Letters in names: B independent problems of one shape, O outputs, I inputs, G groups of a row.

GPTQ pushes the error of column i to the columns j behind it by U_ij / U_ii, where H^-1 = U^T U. With H = R R^T, R upper triangular as
well, column j moves by the same amount when the total errors w_i - q_i of all columns before it are added, each times R_ij / R_jj: the
output error is the sum of squares of (W - Q) R, and each column makes its own column of that as small as it can. So one factorisation
of H is enough, without an inverse (2.5 times as fast on the layers of Llama 1B), and the output error is known when the last column is
rounded. Updates are lazy by halving: the first half of the columns is finished before the second half hears of it, in one matrix
product, and so on down to a few columns.

SparseGPT (arXiv:2301.00774) runs the same loop with weights that become zero instead of, or beside, being rounded. Which ones is decided
when their columns are reached, by w_ij^2 R_jj^2 of the weights as they stand then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.numerics.formats import Format
from aerogel.numerics.quantize import Grid, to_codes, to_values

_FEW = 16
"""Columns that are updated one by one."""
_MANY = 256
"""Columns whose loss is summed at once: temporaries of a cache's size."""


class Feedback(NamedTuple):
    """Factors by which the errors of columns move the columns behind them."""

    weights_BII: Tensor
    """Unit upper triangular: R_ij / R_jj; the identity where the factorisation failed, which is plain rounding."""
    importance_BI: Tensor
    """R_jj squared: the cost of a squared error of column j after the columns behind it have compensated what they can."""
    added_BI: Tensor
    """Added to the diagonal; zeros where the factorisation failed."""
    damping_B: Tensor
    """Share of the mean diagonal that was added to the diagonal."""
    failed_B: Tensor
    """True where no damping up to the bound made the Hessian positive definite."""


class Rounded(NamedTuple):
    """Integer codes of a weight, and what rounding cost."""

    codes_BOI: Tensor
    loss_BO: Tensor
    """The squared error of each output, e H e^T, without what was added to the diagonal of H."""


class Choice(NamedTuple):
    """Choice of the weights to keep, made when the turn of their columns comes."""

    choose: Callable[[Tensor, int, int], Tensor]
    """Scores of n columns (score_BOn, first column, behind the last) -> kept_BOn; high scores are dear."""
    every: int
    """Columns chosen at once."""


class Pruned(NamedTuple):
    """A weight with zeros, and what they and rounding cost."""

    weight_BOI: Tensor
    """Integer codes where weights are rounded too."""
    kept_BOI: Tensor
    loss_BO: Tensor
    """The squared error of each output, e H e^T, without what was added to the diagonal of H."""


@torch.no_grad()
def feedback(hessian_BII: Tensor, damping: float = 0.01, bound: float = 1.0) -> Feedback:
    """Factorise damped Hessians; where that fails the damping grows tenfold, up to `bound`.

    Inputs that were always zero are left out: their columns neither hand on errors nor take any.
    """
    diagonal_BI = hessian_BII.diagonal(dim1=-2, dim2=-1)
    mean_B1 = diagonal_BI.mean(-1, keepdim=True)
    dead_BI = diagonal_BI <= 0
    weights_BII: Tensor | None = None
    importance_BI, all_added_BI = torch.ones_like(diagonal_BI), torch.zeros_like(diagonal_BI)
    damping_B = torch.full_like(mean_B1[:, 0], damping)
    unsolved = (torch.isfinite(mean_B1[:, 0]) & (mean_B1[:, 0] > 0)).nonzero()[:, 0]
    failed_B = torch.ones_like(damping_B, dtype=torch.bool)
    while len(unsolved) and float(damping_B[unsolved[0]]) <= bound:
        # Added where a column is dead, the mean keeps the factor well conditioned and changes nothing else.
        added_BI = mean_B1[unsolved] * (damping_B[unsolved, None] + dead_BI[unsolved])
        unit, diagonal, good = _unit_root(hessian_BII if len(unsolved) == len(hessian_BII) else hessian_BII[unsolved], added_BI)
        if len(unit) == len(hessian_BII):
            weights_BII = unit
        elif len(unit):
            weights_BII = _identity(hessian_BII).clone() if weights_BII is None else weights_BII
            weights_BII[unsolved[good]] = unit
        importance_BI[unsolved[good]] = diagonal.square()
        all_added_BI[unsolved[good]] = added_BI[good]
        failed_B[unsolved[good]] = False
        unsolved = unsolved[~good]
        damping_B[unsolved] = (
            10 * damping_B[unsolved] if damping > 0 else torch.where(damping_B[unsolved] > 0, 10 * damping_B[unsolved], 1e-4)
        )
    weights_BII = _identity(hessian_BII) if weights_BII is None else weights_BII
    return Feedback(weights_BII, importance_BI, all_added_BI, damping_B, failed_B)


def _unit_root(hessian_BII: Tensor, added_BI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper triangular factors of damped Hessians, columns divided by their diagonals, the diagonals, and where there are any.

    Hessians of wide layers are the largest tensors of a run: each step here frees the one before it.
    """
    turned_BII = hessian_BII.flip(-1, -2)
    del hessian_BII
    turned_BII.diagonal(dim1=-2, dim2=-1).add_(added_BI.flip(-1))
    root_BII, info_B = torch.linalg.cholesky_ex(turned_BII)
    del turned_BII
    root_BII = root_BII.flip(-1, -2)  # lower becomes upper: H = R R^T
    diagonal_BI = root_BII.diagonal(dim1=-2, dim2=-1).clone()
    good_B = (info_B == 0) & torch.isfinite(diagonal_BI).all(-1)
    root_BII /= diagonal_BI[:, None, :]
    return root_BII if bool(good_B.all()) else root_BII[good_B], diagonal_BI[good_B], good_B


def _identity(like_BII: Tensor) -> Tensor:
    return torch.eye(like_BII.shape[-1], dtype=like_BII.dtype, device=like_BII.device).expand_as(like_BII)


@torch.no_grad()
def round_columns(
    weight_BOI: Tensor,
    found: Feedback,
    fmt: Format,
    grid: Grid,
    group_BI: Tensor,
    fit: Callable[[Tensor, int, int], Grid] | None = None,
    group: int = 0,
    kept_BOI: Tensor | None = None,
) -> Rounded:
    """Round the columns of `weight_BOI` in order, with error feedback.

    `grid` holds scale_BOG (and zero_BOG), `group_BI` the group of each column. With `fit`, columns are in groups of `group` one
    after another, and the grid of a group is made from its weights as they stand when their turn comes: fit(weight_BOn, first column,
    behind the last) returns scale_BO and zero_BO, which are written into `grid`. Where `kept_BOI` is False the weight is pruned: it
    becomes zero, and all that the columns before have added to it is compensated in the columns that follow, as in SparseGPT
    (arXiv:2301.00774).
    """
    loop = _RoundingLoop(weight_BOI, found, kept_BOI, fmt, grid, group_BI)
    if fit is None:
        loop.span(0, weight_BOI.shape[-1], _FEW, loop.few)
    else:
        loop.span(0, weight_BOI.shape[-1], group, lambda low, high: loop.group(low, high, group, fit))
    return Rounded(loop.codes_IBO.permute(1, 2, 0).contiguous(), loop.loss())


@torch.no_grad()
def prune_columns(weight_BOI: Tensor, found: Feedback, choice: Choice, kept_BOI: Tensor | None = None) -> Pruned:
    """Set weights to zero column by column, with error feedback to those behind; what is False in `kept_BOI` becomes zero in any case."""
    loop = _Loop(weight_BOI, found, torch.ones_like(weight_BOI) if kept_BOI is None else kept_BOI)
    kept_BOI = loop.prune(choice)
    # Pruned weights have all of themselves as their error: these are exactly zero.
    return Pruned((weight_BOI - loop.error_IBO.permute(1, 2, 0)).contiguous(), kept_BOI, loop.loss())


@torch.no_grad()
def prune_and_round_columns(
    weight_BOI: Tensor,
    found: Feedback,
    choice: Choice,
    fmt: Format,
    grid: Grid,
    group_BI: Tensor,
    fit: Callable[[Tensor, int, int], Grid] | None = None,
    group: int = 0,
    kept_BOI: Tensor | None = None,
) -> Pruned:
    """Set weights to zero and round the others in one pass; `grid`, `group_BI`, `fit` and `group` are those of `round_columns`.

    With `fit`, columns that are chosen together are whole groups, or `_FEW` at most that divide a group. A group's grid is then made from
    the weights that stay by the choice as it would be before any of the group is rounded.
    """
    loop = _RoundingLoop(weight_BOI, found, torch.ones_like(weight_BOI) if kept_BOI is None else kept_BOI, fmt, grid, group_BI)
    loop.fit, loop.width = fit, group
    kept_BOI = loop.prune(choice)
    return Pruned(loop.codes_IBO.permute(1, 2, 0).contiguous(), kept_BOI, loop.loss())


def loss_of(error_BOI: Tensor, found: Feedback) -> Tensor:
    """Return the squared error of each output, e H e^T, without what was added to the diagonal of H: loss_BO."""
    own_BOI = (error_BOI @ found.weights_BII).square_().mul_(found.importance_BI[:, None])
    return (own_BOI.sum(-1) - error_BOI.square().mul_(found.added_BI[:, None]).sum(-1)).clamp_(min=0)


def fits_on_the_way(choice: Choice, group: int) -> bool:
    """Return True where the grid of a group can be made when its turn comes, though weights are chosen on the way."""
    return choice.every % group == 0 or (choice.every < _FEW and group % choice.every == 0)


class _Loop:
    """The buffers of the column loop; a column of the weights is a run of memory here, for all rows and problems at once."""

    def __init__(self, weight_BOI: Tensor, found: Feedback, kept_BOI: Tensor | None) -> None:
        # What stands here is weights, moved by the errors before them, and what rounding took from them once they are rounded.
        self.weight_IBO = weight_BOI.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
        # What stands here is weights as they were, and their total errors once they are rounded.
        self.error_IBO = self.weight_IBO.clone()
        self.values_NBO = torch.empty_like(self.weight_IBO[:_FEW])
        self.found, self.weights_BII = found, found.weights_BII
        self.choice: Choice | None = None
        """Choice that is made while a few columns are changed, where it is of so few."""
        self.unit = _FEW
        """Columns that are changed one by one before those behind hear of them."""
        self.kept_IBO = None if kept_BOI is None else kept_BOI.permute(2, 0, 1).to(weight_BOI.dtype, memory_format=torch.contiguous_format)
        # Views, made once: in the loop every microsecond counts.
        self.columns = self.weight_IBO.unbind(0)
        self.errors = self.error_IBO.unbind(0)
        self.values = self.values_NBO.unbind(0)

    def prune(self, choice: Choice) -> Tensor:
        """Go through all columns, with weights chosen on the way; returns kept_BOI."""
        columns = len(self.weight_IBO)
        if choice.every < _FEW:
            self.choice, self.unit = choice, choice.every * (_FEW // choice.every)
            self.inside(0, columns)
        else:

            def chosen(low: int, high: int) -> None:
                self._require_mask()[low:high] = self._kept(choice, low, high)
                self.inside(low, high)

            self.span(0, columns, choice.every, chosen)
        return self._require_mask().permute(1, 2, 0).to(torch.bool).contiguous()

    def inside(self, low: int, high: int) -> None:
        """Go through columns whose weights are chosen, or are chosen a few at a time."""
        self.span(low, high, self.unit, self.few)

    def _require_mask(self) -> Tensor:
        assert self.kept_IBO is not None, "there is a mask to choose in"
        return self.kept_IBO

    def _kept(self, choice: Choice, low: int, high: int) -> Tensor:
        """Return the kept_nBO of columns that have heard of all errors before them; what was not kept before is worth nothing."""
        kept_nBO = self._require_mask()[low:high]
        score_nBO = (self._compensated(low, high) * kept_nBO).square_().mul_(self.found.importance_BI[:, low:high].T[..., None])
        return kept_nBO * choice.choose(score_nBO.permute(1, 2, 0), low, high).permute(2, 0, 1)

    def span(self, low: int, high: int, unit: int, finish: Callable[[int, int], None]) -> None:
        """Round columns that have heard of all errors before them; halves meet at multiples of `unit`."""
        if high - low <= unit:
            finish(low, high)
            return
        middle = low + (-(-(high - low) // unit) // 2) * unit
        self.span(low, middle, unit, finish)
        self._push(low, middle, high)
        self.span(middle, high, unit, finish)

    def _compensated(self, low: int, high: int) -> Tensor:
        """Return the weights that make the loss least with all columns before rounded, if these and those behind could have any value."""
        unit_Bnn, error_nBO = self.weights_BII[:, low:high, low:high], self.error_IBO[low:high]
        moved_BnO = (self.weight_IBO[low:high] - error_nBO).transpose(0, 1)
        return error_nBO + torch.linalg.solve_triangular(unit_Bnn.mT, moved_BnO, upper=False, unitriangular=True).transpose(0, 1)

    def few(self, low: int, high: int) -> None:
        """Round or prune a few columns one by one."""
        push_NNB1 = self.weights_BII[:, low:high, low:high].permute(1, 2, 0)[..., None]
        before_NBO = self.error_IBO[low:high].clone()
        for index, column in enumerate(range(low, high)):
            if self.choice is not None and column % self.choice.every == 0:
                behind = min(column + self.choice.every, len(self.columns))
                self._require_mask()[column:behind] = self._kept(self.choice, column, behind)
            self._change(column, self.values[index])
            if column + 1 < high:
                self.weight_IBO[column + 1 : high].addcmul_(push_NNB1[index, index + 1 :], self.errors[column])
        # The weights as they were, less their total errors, are what the columns were rounded to.
        self.weight_IBO[low:high] -= before_NBO.sub_(self.error_IBO[low:high])
        self._store(low, high)

    def _change(self, column: int, value_BO: Tensor) -> None:
        """Take from the weights of a column what they become, and leave their total errors."""
        assert self.kept_IBO is not None, "without rounding, pruning is all that changes a weight"
        torch.mul(self.columns[column], self.kept_IBO[column], out=value_BO)
        self.errors[column].sub_(value_BO)

    def _store(self, low: int, high: int) -> None:
        """Store what a few columns became, beside their errors."""

    def loss(self) -> Tensor:
        """Return the loss_BO of all columns, when they are changed."""
        found = self.found
        loss_BO = torch.zeros_like(self.weight_IBO[0])
        for low in range(0, len(self.weight_IBO), _MANY):
            columns = slice(low, low + _MANY)
            importance_NB1, added_NB1 = (factor_BI[:, columns].T[..., None] for factor_BI in (found.importance_BI, found.added_BI))
            loss_BO += (self.weight_IBO[columns].square().mul_(importance_NB1)).sum(0)
            loss_BO -= (self.error_IBO[columns].square().mul_(added_NB1)).sum(0)
        return loss_BO.clamp_(min=0)

    def _push(self, low: int, middle: int, high: int) -> None:
        """Tell the second half of a span about the errors of the first."""
        if len(self.weights_BII) == 1:
            self.weight_IBO[middle:high, 0].addmm_(self.weights_BII[0, low:middle, middle:high].T, self.error_IBO[low:middle, 0])
        else:
            weight_BIO, error_BIO = self.weight_IBO.transpose(0, 1), self.error_IBO.transpose(0, 1)
            weight_BIO[:, middle:high].baddbmm_(self.weights_BII[:, low:middle, middle:high].mT, error_BIO[:, low:middle])


class _RoundingLoop(_Loop):
    """The loop with weights that are rounded."""

    def __init__(self, weight_BOI: Tensor, found: Feedback, kept_BOI: Tensor | None, fmt: Format, grid: Grid, group_BI: Tensor) -> None:
        super().__init__(weight_BOI, found, kept_BOI)
        self.codes_IBO = torch.empty_like(self.weight_IBO, dtype=fmt.storage)
        self.format, self.grid = fmt, grid
        self.scale_GBO = grid.step.to(weight_BOI.dtype).permute(2, 0, 1).contiguous()
        self.zero_GBO = None if grid.zero is None else grid.zero.to(weight_BOI.dtype).permute(2, 0, 1).contiguous()
        self.fit: Callable[[Tensor, int, int], Grid] | None = None
        self.width = 0
        # Views too.
        self.scales = _rows(self.scale_GBO, group_BI)
        self.zeros = None if self.zero_GBO is None else _rows(self.zero_GBO, group_BI)

    def inside(self, low: int, high: int) -> None:
        """Go through whole groups, where their grids are made on the way."""
        if self.fit is None:
            super().inside(low, high)
        else:
            fit = self.fit
            self.span(low, high, self.width, lambda low, high: self.group(low, high, self.width, fit))

    def group(self, low: int, high: int, group: int, fit: Callable[[Tensor, int, int], Grid]) -> None:
        """Make the grid of a group from its weights as they stand now, then round them."""
        weight_nBO = self._compensated(low, high)
        if self.choice is not None:
            starts = range(low, high, self.choice.every)
            weight_nBO *= torch.cat([self._kept(self.choice, start, min(start + self.choice.every, high)) for start in starts])
        elif self.kept_IBO is not None:
            weight_nBO *= self.kept_IBO[low:high]
        found, index = fit(weight_nBO.permute(1, 2, 0), low, high), low // group
        self.scale_GBO[index] = self.grid.scale[..., index] = found.scale
        if self.zero_GBO is not None and self.grid.zero is not None and found.zero is not None:
            self.zero_GBO[index] = self.grid.zero[..., index] = found.zero
        self.span(low, high, self.unit, self.few)

    def _change(self, column: int, value_BO: Tensor) -> None:
        scale, error = self.scales[column], self.errors[column]
        torch.div(self.columns[column], scale, out=value_BO)
        if self.zeros is None:
            _round(value_BO, self.format)
            if self.kept_IBO is not None:
                value_BO.mul_(self.kept_IBO[column])
            error.addcmul_(value_BO, scale, value=-1)
        else:
            _round(value_BO.add_(self.zeros[column]), self.format)
            if self.kept_IBO is not None:
                torch.lerp(self.zeros[column], value_BO, self.kept_IBO[column], out=value_BO)
            error.addcmul_(value_BO - self.zeros[column], scale, value=-1)

    def _store(self, low: int, high: int) -> None:
        values_NBO = self.values_NBO[: high - low]
        self.codes_IBO[low:high] = values_NBO if self.format.kind == "int" else to_codes(values_NBO, self.format)


def _round(scaled: Tensor, fmt: Format) -> Tensor:
    """Round to the values of a format, in place."""
    if fmt.kind == "int":
        return scaled.round_().clamp_(fmt.low, fmt.high)
    return scaled.copy_(to_values(to_codes(scaled, fmt), fmt))


def _rows(grid_GBO: Tensor, group_BI: Tensor) -> list[Tensor]:
    """The scales_BO of every column; views of `grid_GBO` where all problems have their groups in one order."""
    if bool((group_BI == group_BI[:1]).all()):
        groups = grid_GBO.unbind(0)
        return [groups[group] for group in group_BI[0].tolist()]
    return list(torch.stack([grid_GBO[group_I, problem] for problem, group_I in enumerate(group_BI)], 1))
