"""RIA: the formula, what its order does not depend on, patterns, convolutions in groups, and layers that no token reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.methods.sparsity.ria import Ria, relative_importance
from aerogel.model.walk import Walk
from tests.methods.sparsity.cells import Images, inputs, visit
from tests.tiny import FAMILIES, opened

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
    seen = visit(Ria(pattern="2:4", permute=False))
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


def test_inputs_that_can_be_permuted_are_so_before_a_pattern() -> None:
    """Of a llama block that is the second layer of the MLP: what its pattern keeps of the score is more, and the others are as without."""
    calls = FAMILIES["llama"].calls(2)
    found = {}
    for permute in (False, True):
        network = opened("llama")
        block = next(iter(Walk(network, calls)))
        before = block.module.get_parameter("mlp.down_proj.weight").clone()
        Ria(pattern="2:4", permute=permute).compress(block)
        after = block.module.get_parameter("mlp.down_proj.weight")
        found[permute] = block.module.state_dict(), {note["name"]: note.get("permutation", "") for note in block.notes}
        assert (after.unflatten(1, (-1, 4)).count_nonzero(-1) == 2).all()
        # Columns of what is left are columns of the weight, some of whose numbers are zero.
        owners = [[j for j in range(before.shape[1]) if ((column == before[:, j]) | (column == 0)).all()] for column in after.T]
        assert all(len(owner) == 1 for owner in owners)
        assert ([owner[0] for owner in owners] == list(range(len(owners)))) != permute
    plain, permuted = (found[permute][0] for permute in (False, True))
    for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight"):
        assert torch.equal(plain[name], permuted[name])
    told = found[True][1]
    assert "mlp.up_proj" in told["model.layers.0.mlp.down_proj"]
    assert all(text.startswith("none") for name, text in told.items() if not name.endswith("down_proj"))
    assert not any(found[False][1].values())


def test_a_permutation_moves_rows_with_their_masks() -> None:
    """The rows of the MLP's first layers are pruned as they would be unpermuted, in another order."""
    rows = {}
    for permute in (False, True):
        block = next(iter(Walk(opened("llama"), FAMILIES["llama"].calls(2))))
        Ria(pattern="2:4", permute=permute).compress(block)
        rows[permute] = block.module.get_parameter("mlp.gate_proj.weight")
    assert not torch.equal(rows[True], rows[False])
    assert sorted(map(tuple, rows[True].tolist())) == sorted(map(tuple, rows[False].tolist()))
