"""Ranges: against searches and averages written out one group at a time."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.numerics import observers
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.observers import MovingAverage, RunningMinMax, Searched, min_max, mse_search, percentile
from aerogel.numerics.quantize import Grid, dequantize, grid_from_range, grouped, quantize, weight_grid
from aerogel.numerics.scheme import PerChannel, PerGroup, PerTensor, Scheme, TensorScheme

SCHEMES = [
    TensorScheme(FORMATS["int3"], PerGroup(32)),
    TensorScheme(FORMATS["int4"], PerGroup(40), symmetric=False),  # 96 columns leave a short group
    TensorScheme(FORMATS["int2"], PerChannel()),
    TensorScheme(FORMATS["int4"], PerTensor()),
    Scheme.parse("NVFP4A16").weights,
]


def weight(columns: int = 96) -> torch.Tensor:
    w = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    return w * (1 + 5 * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.97))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_min_max_is_the_weight_grid(scheme: TensorScheme) -> None:
    w = weight()
    ours, plain = min_max(grouped(w, scheme.granularity), scheme), weight_grid(w, scheme)
    assert torch.equal(ours.scale, plain.scale)
    assert ours.scale.shape == plain.scale.shape


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_mse_search_is_the_loop_over_candidates(scheme: TensorScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    whole = mse_search(grouped(w, scheme.granularity), scheme, steps=20)
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else w.shape[1]
    one = TensorScheme(scheme.format, PerTensor(), scheme.symmetric)
    for row in range(len(w)):
        for group, run in enumerate(w[row].split(size)):
            errors = {}
            for i in range(17):
                grid = grid_from_range(run.min().clamp(max=0) * (1 - i / 20), run.max().clamp(min=0) * (1 - i / 20), one)
                errors[float(grid.scale)] = float((dequantize(quantize(run, grid, one), grid, one) - run).abs().pow(2.4).sum())
            assert errors[float(whole.scale[row, group])] == pytest.approx(min(errors.values()), rel=1e-4)
    monkeypatch.setattr(observers, "CHUNK_VALUES", 70)
    assert torch.equal(mse_search(grouped(w, scheme.granularity), scheme, steps=20).scale, whole.scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_mse_search_never_loses_to_min_max(scheme: TensorScheme) -> None:
    w = weight()

    def error(grid: Grid) -> float:
        return float((dequantize(quantize(w, grid, scheme), grid, scheme) - w).abs().pow(2.4).sum())

    best = error(mse_search(grouped(w, scheme.granularity), scheme))
    assert best < error(weight_grid(w, scheme))


def test_percentile_takes_the_nearest_ranks() -> None:
    scheme = TensorScheme(FORMATS["int8"], PerTensor(), symmetric=False)
    x = torch.arange(-300.0, 700.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    grid = percentile(x, scheme, 0.99)
    assert float(grid.scale) == pytest.approx((689 - -290) / 255)  # ten numbers lie beyond each end
    assert torch.equal(percentile(x, scheme, 1.0).scale, min_max(x, scheme).scale)
    with pytest.raises(AerogelError, match=r"share is 0\.2"):
        percentile(x, scheme, 0.2)


def test_running_ranges() -> None:
    scheme = TensorScheme(FORMATS["int8"], PerTensor(), symmetric=False)
    extremes, average = RunningMinMax(scheme), MovingAverage(scheme, rate=0.25)
    for observer in (extremes, average):
        for batch in ([-1.0, 3.0], [], [-2.0, 1.0], [0.5, 7.0]):
            observer.update(torch.tensor([batch]))
    assert float(extremes.grid().scale) == pytest.approx((7 - -2) / 255)
    low, high = (-1 * 0.75 - 2 * 0.25) * 0.75 + 0.5 * 0.25, (3 * 0.75 + 1 * 0.25) * 0.75 + 7 * 0.25
    assert float(average.grid().scale) == pytest.approx((high - low) / 255)


def test_what_cannot_be_measured_is_refused() -> None:
    observer = MovingAverage(TensorScheme(FORMATS["int8"], PerTensor()))
    with pytest.raises(AerogelError, match="no activation reached"):
        observer.grid()
    with pytest.raises(AerogelError, match="NaN or infinity"):
        observer.update(torch.tensor([1.0, float("nan")]))


def test_a_search_on_drawn_numbers_finds_what_a_search_on_all_finds() -> None:
    scheme = TensorScheme(FORMATS["int8"], PerTensor(), symmetric=False)
    torch.manual_seed(0)
    x = torch.randn(4, 1000)
    whole = Searched(scheme, 2000)
    for row in x:
        whole.update(row)
    assert float(whole.grid().scale) == float(mse_search(x.flatten(), scheme, p=2.4, shrink=0.79).scale), "small ones are kept whole"
    drawn = Searched(scheme, 300)
    for row in x:
        drawn.update(row)
    assert sum(len(part) for part in drawn.drawn) == 1200
    assert float(drawn.grid().scale) == pytest.approx(float(whole.grid().scale), rel=0.2)
