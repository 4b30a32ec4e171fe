"""RIA: the formula, what its order does not depend on, patterns, convolutions in groups, and layers that no token reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.methods.sparsity.ria import Ria, relative_importance
from tests.methods.sparsity.cells import Images, inputs, visit

MATRIX = {"options": {"sparsity": 0.02}}  # which moves a network of random weights by less than eight bits do


def literal(weight: Tensor, x: Tensor | None, exponent: float = 0.5) -> Tensor:
    """The paper's score, element by element."""
    size = weight.abs().double()
    score = torch.empty_like(size)
    for i in range(len(size)):
        for j in range(size.shape[1]):
            score[i, j] = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
    return score if x is None else score * x.double().norm(dim=0) ** exponent


def without_lowest(score: Tensor, sparsity: float, compared: str = "layer") -> Tensor:
    """The mask of what is kept."""
    if compared == "row":
        return torch.stack([without_lowest(row[None], int(len(row) * sparsity) / len(row))[0] for row in score])
    kept = torch.ones(score.numel(), dtype=torch.bool)
    kept[score.flatten().argsort(stable=True)[: round(score.numel() * sparsity)]] = False
    return kept.view_as(score)


@pytest.mark.parametrize("options", [{}, {"compared": "row"}, {"exponent": 1.0}, {"exponent": 0.0}, {"sparsity": 0.7}])
def test_the_lowest_scores_go(options: dict[str, Any]) -> None:
    scale = torch.logspace(-0.5, 0.5, 32)
    seen = visit(Ria(**options), inputs(scale=scale))
    for name in ("left", "right"):
        score = literal(seen.before[name], seen.x, options.get("exponent", 0.5))
        kept = without_lowest(score, options.get("sparsity", 0.5), options.get("compared", "layer"))
        assert torch.equal(seen.weight(name), seen.before[name] * kept)


def test_a_pattern_keeps_the_highest_scores_of_every_few() -> None:
    seen = visit(Ria(pattern="2:4"))
    score = literal(seen.before["left"], seen.x).unflatten(-1, (-1, 4))
    assert torch.equal(seen.kept("left"), torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(2).indices, True).flatten(-2))


def test_scaling_a_row_or_a_column_leaves_the_order_inside_it() -> None:
    size = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    score = relative_importance(size)
    for line in (slice(2, 3), slice(None)):
        column = slice(None) if line != slice(None) else slice(4, 5)
        scaled = size.clone()
        scaled[line, column] *= 7
        found = relative_importance(scaled)[line, column].flatten()
        assert torch.equal(found.argsort(), score[line, column].flatten().argsort())


def test_with_equal_sums_it_is_magnitude_with_norms() -> None:
    """A Latin square has equal sums in rows and columns."""
    values = torch.rand(8, generator=torch.Generator().manual_seed(0))
    square = torch.stack([values.roll(shift) for shift in range(8)])
    ratio = relative_importance(square) / square
    torch.testing.assert_close(ratio, ratio[:1, :1].expand(8, 8))


def test_rows_and_columns_of_zeros_have_no_importance() -> None:
    size = torch.rand(4, 4)
    size[1] = size[:, 2] = 0
    found = relative_importance(size)
    assert found.isfinite().all()
    assert torch.equal(found == 0, size == 0)


def test_a_layer_that_no_token_reached_goes_by_its_weights() -> None:
    seen = visit(Ria())
    assert torch.equal(seen.kept("idle"), without_lowest(literal(seen.before["idle"], None), 0.5))
    assert [name for name, note in seen.notes.items() if "no token reached it" in note.get("fallback", "")] == ["idle"]


def test_outputs_of_a_group_are_compared_with_those_that_read_the_same_channels() -> None:
    xs = [torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    seen = visit(Ria(exponent=0.0, targets=("Conv2d",)), xs, Images())
    score = torch.cat([literal(part, None) for part in seen.before["grouped"].split(4)])
    assert torch.equal(seen.kept("grouped"), without_lowest(score, 0.5))
