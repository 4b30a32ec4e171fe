"""Column rounding with feedback gives the codes of the paper's loop, which pushes errors through the inverse moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.numerics.feedback import feedback, round_columns
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.quantize import Grid, grid_from_range, to_codes, to_values
from aerogel.numerics.scheme import PerGroup, TensorScheme

INT3 = FORMATS["int3"]


def moments(problems: int, columns: int, seed: int = 0) -> Tensor:
    """Second moments of correlated inputs in double precision, so that only a mistake can change a code."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(problems, 4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return x.mT @ x / x.shape[1]


def weights(problems: int, outputs: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(problems, outputs, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper(weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor, damping: float) -> Tensor:
    """Algorithm 1 without its blocks: H^-1 = U^T U, and every error goes to all columns behind at once. Scales are per element."""
    weight = weight.clone()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        codes[:, column] = (weight[:, column] / scale[:, column] + zero[:, column]).round().clamp(-4, 3)
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (weight[:, column] - rounded) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("problems", [1, 3])
@pytest.mark.parametrize("columns", [5, 16, 72, 150])
def test_codes_are_those_of_the_papers_loop(problems: int, columns: int, symmetric: bool) -> None:
    weight, moment = weights(problems, 6, columns), moments(problems, columns)
    generator = torch.Generator().manual_seed(2)
    scale = 0.3 + torch.rand(problems, 6, 5, generator=generator, dtype=torch.float64)
    zero = None if symmetric else torch.randint(-2, 3, scale.shape, generator=generator).to(torch.int8)
    group = torch.randint(0, 5, (problems, columns), generator=generator)
    found = feedback(moment, 0.01)
    codes = round_columns(weight, found, INT3, Grid(scale, zero), group).codes_BOI
    for b in range(problems):
        spread = torch.zeros_like(weight[b]) if zero is None else zero[b][:, group[b]].double()
        assert torch.equal(codes[b].double(), paper(weight[b], moment[b], scale[b][:, group[b]], spread, 0.01))


def test_a_moving_grid_sees_the_errors_before_its_group() -> None:
    scheme = TensorScheme(INT3, PerGroup(24), symmetric=False)
    weight, moment = weights(1, 4, 60)[0], moments(1, 60)[0]

    def fit(x: Tensor, low: int = 0, high: int = 0) -> Grid:
        return grid_from_range(x.amin(-1), x.amax(-1), scheme)

    found = feedback(moment[None], 0.01)
    grid = Grid(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3, dtype=torch.int8))
    codes = round_columns(weight[None], found, INT3, grid, (torch.arange(60) // 24)[None], fit, 24).codes_BOI[0]

    current, damped = weight.clone(), moment + 0.01 * moment.diagonal().mean() * torch.eye(60, dtype=moment.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for column in range(60):
        if column % 24 == 0:
            step = fit(current[:, column : column + 24])
            assert torch.allclose(grid.scale[0, :, column // 24], step.scale)
            assert step.zero is not None
            assert torch.equal(grid.zero[0, :, column // 24], step.zero)  # type: ignore[index]
        code = (current[:, column] / step.scale + step.zero).round().clamp(-4, 3)
        assert torch.equal(codes[:, column].double(), code.double())
        error = (current[:, column] - (code - step.zero) * step.scale) / upper[column, column]  # type: ignore[operator]
        current[:, column:] -= error[:, None] * upper[column, column:]


def test_dead_columns_are_rounded_and_disturb_nobody() -> None:
    moment = moments(1, 12)[0]
    alive = [i for i in range(12) if i not in (0, 7)]
    moment[[0, 7]] = 0
    moment[:, [0, 7]] = 0
    weight, scale = weights(1, 5, 12)[0], torch.full((5, 1), 0.4, dtype=torch.float64)
    found = feedback(moment[None], 0.01)
    codes = round_columns(weight[None], found, INT3, Grid(scale[None]), torch.zeros(1, 12, dtype=torch.long)).codes_BOI[0]
    assert not found.failed_B.any()
    assert torch.equal(codes[:, [0, 7]].double(), (weight[:, [0, 7]] / 0.4).round().clamp(-4, 3))
    # The damping's mean runs over all columns, dead ones included, so the rest is the same problem with a little more of it.
    share = 0.01 * len(alive) / 12
    expected = paper(weight[:, alive], moment[alive][:, alive], scale.expand(-1, 10), torch.zeros(5, 10, dtype=torch.float64), share)
    assert torch.equal(codes[:, alive].double(), expected)


def test_damping_grows_until_the_factor_exists_and_gives_up_at_the_bound() -> None:
    none = torch.zeros(8, 8, dtype=torch.float64)
    flat = torch.ones(8, 8, dtype=torch.float64)
    indefinite = flat - 0.5 * torch.eye(8, dtype=torch.float64)  # smallest eigenvalue -0.5 at a mean diagonal of 0.5
    hopeless = -torch.eye(8, dtype=torch.float64) + 2 * torch.diag(torch.tensor([5.0] + [0.1] * 7, dtype=torch.float64))
    good = moments(1, 8)[0]
    found = feedback(torch.stack([good, 2 * indefinite, none, good * torch.nan]), 0.2, bound=2.0)
    assert found.damping_B[0] == pytest.approx(0.2)
    assert found.damping_B[1] == pytest.approx(2.0)
    assert found.failed_B.tolist() == [False, False, True, True]
    assert torch.equal(found.weights_BII[2], torch.eye(8, dtype=torch.float64))
    assert torch.equal(found.weights_BII[3], torch.eye(8, dtype=torch.float64))
    assert feedback(hopeless[None], 0.01, bound=0.1).failed_B.all()


def test_importance_is_what_the_error_of_a_column_costs() -> None:
    """The damped loss of any rounding is the sum of squared steps from where the columns stood, each times its importance."""
    weight, moment = weights(1, 4, 20)[0], moments(1, 20)[0]
    found = feedback(moment[None], 0.01)
    scale = torch.full((1, 4, 1), 0.5, dtype=torch.float64)
    rounded = round_columns(weight[None], found, INT3, Grid(scale), torch.zeros(1, 20, dtype=torch.long))
    error = weight - rounded.codes_BOI[0].double() * 0.5
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    steps = error @ found.weights_BII[0]
    torch.testing.assert_close(((error @ damped) * error).sum(1), (steps.square() * found.importance_BI[0]).sum(1))
    torch.testing.assert_close(((error @ moment) * error).sum(1), rounded.loss_BO[0])


def test_without_damping_the_first_try_is_undamped() -> None:
    moment = moments(2, 6)
    found = feedback(moment, 0.0)
    assert found.damping_B.tolist() == [0.0, 0.0]
    rank_one = torch.ones(1, 6, 6, dtype=torch.float64) * 3
    singular = feedback(rank_one, 0.0)
    assert not singular.failed_B.any()
    assert 0 < float(singular.damping_B) <= 1e-3


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4_e2m1"])
def test_float_formats_round_to_their_values_and_gain_from_feedback(name: str) -> None:
    fmt, weight, moment = FORMATS[name], weights(1, 16, 64).float(), moments(1, 64).float()
    scale = weight.abs().amax(-1, keepdim=True) / fmt.high
    group = torch.zeros(1, 64, dtype=torch.long)
    plain = round_columns(weight, feedback(torch.zeros(1, 64, 64)), fmt, Grid(scale), group).codes_BOI
    assert torch.equal(to_values(plain, fmt), to_values(to_codes(weight / scale, fmt), fmt))
    helped = round_columns(weight, feedback(moment), fmt, Grid(scale), group).codes_BOI

    def cost(codes: Tensor) -> float:
        error = weight - to_values(codes, fmt) * scale
        return float(((error @ moment) * error).sum())

    assert cost(helped) < 0.7 * cost(plain)


def paper_of_sparsegpt(weight: Tensor, moment: Tensor, scale: Tensor, zero: Tensor, kept: Tensor, damping: float) -> Tensor:
    """SparseGPT's loop with quantization (arXiv:2301.00774, section 3.5): a pruned weight is zero, and its whole value is an error."""
    weight = weight.clone()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        nearest = (weight[:, column] / scale + zero).round().clamp(-4, 3)
        codes[:, column] = torch.where(kept[:, column], nearest, zero)
        error = (weight[:, column] - (codes[:, column] - zero) * scale) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("problems", [1, 2])
def test_pruned_weights_stay_zero_and_are_compensated(problems: int, symmetric: bool) -> None:
    columns = 40
    weight, moment = weights(problems, 6, columns), moments(problems, columns)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    weight = weight * kept
    scale = torch.full((problems, 6, 1), 0.4, dtype=torch.float64)
    zero = None if symmetric else torch.full((problems, 6, 1), 1, dtype=torch.int8)
    group = torch.zeros(problems, columns, dtype=torch.long)
    found = feedback(moment, 0.01)
    rounded = round_columns(weight, found, INT3, Grid(scale, zero), group, kept_BOI=kept)
    codes = rounded.codes_BOI
    shift = torch.zeros(6) if zero is None else torch.ones(6)
    for b in range(problems):
        wanted = paper_of_sparsegpt(weight[b], moment[b], scale[b, :, 0], shift.double(), kept[b], 0.01)
        assert torch.equal(codes[b].double(), wanted)
        assert bool((codes[b][~kept[b]] == (0 if symmetric else 1)).all())
