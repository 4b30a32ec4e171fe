"""The share of zeros, and patterns that keep the largest of each few."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.numerics.sparsity import (
    block_of,
    kept_by_count,
    kept_by_pattern,
    kept_by_row,
    kept_like,
    kept_of_all,
    run_of,
    smallest,
    zero_share,
)


def by_sorting(weight: Tensor, count: int) -> Tensor:
    """The literal method: sort all magnitudes, drop the first `count`."""
    order = weight.abs().flatten().sort(stable=True).indices
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[order[:count]] = False
    return kept.view_as(weight)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))
def test_the_smallest_of_a_matrix_go(percent: int, dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = weight[1]  # equal magnitudes
    count = round(percent / 100 * 210)
    assert torch.equal(kept_by_count(weight.abs(), count), by_sorting(weight, count))


def test_the_smallest_of_each_row_go() -> None:
    score = torch.tensor([[3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert kept_by_row(score, 1).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert kept_by_row(score, 0).all()
    assert kept_by_row(score, torch.tensor([2, 0])).tolist() == [[True, False, False, True], [True] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_threshold_for_all_matrices_is_that_of_their_sorted_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(5, 40, generator=generator) * size).to(dtype) for size in (1.0, 0.1, 3.0)]
    kept = torch.cat(list(kept_of_all(parts, round(0.4 * 600))))
    assert torch.equal(kept, by_sorting(torch.cat(parts), round(0.4 * 600)))
    assert [int((~part).sum()) for part in kept.split(5)][1] > 150, "the layer of small weights loses most"


def test_the_threshold_and_its_ties() -> None:
    assert smallest([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0])], 2) == (1.0, 1)
    assert smallest([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0])], 4) == (3.0, 1)
    assert smallest([torch.tensor([1e-40, 2e-40])], 1)[1] == 1


def test_the_share_of_zeros() -> None:
    assert zero_share(torch.tensor([[0.0, 1.0], [-0.0, 2.0]])) == 0.5
    assert zero_share(torch.ones(3)) == 0.0


def test_a_pattern_keeps_the_largest_of_each_run() -> None:
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0]])
    assert kept_by_pattern(score, 2, 4).tolist() == [[False, True, True, False, True, True, False, False]]
    assert kept_by_pattern(score, 4, 8).tolist() == [[False, True, False, False, True, True, True, False]]


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8)])
def test_the_pattern_of_a_mask_is_recognised_and_repeated(kept: int, of: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mask_OI = kept_by_pattern(torch.rand(6, 48, generator=generator), kept, of)
    assert run_of(mask_OI) == of
    scores_OI = torch.rand(6, 48, generator=generator)
    assert torch.equal(kept_like(scores_OI, mask_OI), kept_by_pattern(scores_OI, kept, of))


def test_a_mask_of_rows_and_one_of_a_layer_are_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_OI, others_OI = torch.rand(2, 6, 48, generator=generator)
    rows_OI, layer_OI = kept_by_row(scores_OI, 19), kept_by_count(scores_OI, 100)
    assert (run_of(rows_OI), run_of(layer_OI)) == (48, 6 * 48)
    assert torch.equal(kept_like(others_OI, rows_OI), kept_by_row(others_OI, 19))
    assert torch.equal(kept_like(others_OI, layer_OI), kept_by_count(others_OI, 100))


@settings(deadline=None, max_examples=25)
@given(side=st.sampled_from((8, 16, 32)), rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_blocks_are_recognised_and_repeated(side: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gone_RC = torch.rand(rows, columns, generator=generator) < 0.5
    kept_OI = ~gone_RC.repeat_interleave(side, 0).repeat_interleave(side, 1)
    weight_OI = torch.rand(kept_OI.shape, generator=generator) + 1
    found = block_of(weight_OI * kept_OI)
    assert found is None if kept_OI.all() else found is not None and found % side == 0
    if found == side:
        again_OI = kept_like(weight_OI, kept_OI)
        sums = weight_OI.unflatten(0, (-1, side)).unflatten(-1, (-1, side)).sum((1, 3)).flatten()
        lost = sums.argsort()[: int(gone_RC.sum())].tolist()
        for place in range(rows * columns):
            r, c = divmod(place, columns)
            assert bool((again_OI[side * r : side * r + side, side * c : side * c + side] == (place not in lost)).all())


def test_small_numbers_that_became_zero_hide_no_blocks_and_scattered_zeros_are_none() -> None:
    weight_OI = torch.ones(64, 64)
    weight_OI[:32, :32] = 0
    weight_OI[40, 40] = 0
    assert block_of(weight_OI) == 32
    weight_OI[40:48, 40] = weight_OI[48, 32:40] = 0
    assert block_of(weight_OI) is None
    assert block_of(torch.eye(64)) is None
    assert block_of(torch.ones(64, 60)) is None
