"""SparseGPT: the paper's loop in double precision, closed forms, patterns, rounding in the same pass, and what falls back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.engine.opening import open_model
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.methods.sparsity import sparsegpt
from aerogel.methods.sparsity.sparsegpt import Rounding, Sparsegpt, smallest_of, solve
from aerogel.methods.sparsity.sparsegpt import pattern as pattern_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.processes import Processes
from aerogel.model.solutions import Share
from aerogel.numerics.feedback import Choice
from aerogel.numerics.scheme import Scheme
from tests.methods.sparsity.cells import Cell, inputs, visit

MATRIX = {"options": {"sparsity": 0.02}}  # which moves a network of random weights by less than eight bits do


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def literal(weight: Tensor, hessian: Tensor, sparsity: float, block_size: int = 128, pattern: tuple[int, int] | None = None) -> Tensor:
    """The paper's loop: W with zeros, in double precision."""
    weight, columns = weight.double().clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    zero = torch.zeros_like(weight, dtype=torch.bool)
    every = pattern[1] if pattern else block_size
    for j in range(columns):
        if j % every == 0:
            part = weight[:, j : j + every]
            score = part.square() / upper.diagonal()[j : j + every].square()
            if pattern:
                zero[:, j : j + every].scatter_(1, score.topk(pattern[1] - pattern[0], largest=False).indices, True)
            else:
                high = min(j + every, columns)
                count = round(sparsity * len(weight) * high) - round(sparsity * len(weight) * j)
                picked = torch.zeros(part.numel(), dtype=torch.bool)
                picked[score.flatten().argsort()[:count]] = True
                zero[:, j : j + every] = picked.view_as(part)
        new = weight[:, j].masked_fill(zero[:, j], 0)
        error = (weight[:, j] - new) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[:, j] = new
    return weight


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 20, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_weights_are_those_of_the_paper(block_size: int, sparsity: float) -> None:
    seen = visit(Sparsegpt(sparsity, block_size=block_size))
    for name in ("left", "right"):
        expected = literal(seen.before[name], moment(seen.x), sparsity, block_size)
        assert int((~seen.kept(name)).sum()) == round(sparsity * expected.numel())
        torch.testing.assert_close(seen.weight(name).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("8:16", 8, 16), ("16:32", 16, 32)])
def test_a_pattern_is_chosen_from_weights_as_they_stand(pattern: str, kept: int, of: int) -> None:
    seen = visit(Sparsegpt(1 - kept / of, pattern))
    for name in ("left", "right"):
        torch.testing.assert_close(
            seen.weight(name).double(), literal(seen.before[name], moment(seen.x), 0, pattern=(kept, of)), rtol=1e-3, atol=1e-4
        )
        assert (seen.kept(name).unflatten(1, (-1, of)).sum(-1) == kept).all()


def test_without_correlations_it_is_magnitude_and_nothing_moves() -> None:
    """H = c I; exact."""
    weight = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0))
    choice = Choice(smallest_of([[(slice(0, 6), 0.5)]]), 8)
    found = solve(weight, 3 * torch.eye(24)[None], choice).codes_BOI
    for part, was in zip(found[0].split(8, 1), weight[0].split(8, 1), strict=True):
        least = was.abs().flatten().argsort()[: was.numel() // 2]
        assert torch.equal(part.flatten(), was.flatten().index_fill(0, least, 0))


def test_the_first_column_removed_is_the_surgeons_update() -> None:
    """Optimal Brain Surgeon: w_j -= w_0 (H^-1)_0j / (H^-1)_00 for all j."""
    x = torch.cat([x.reshape(-1, 32) for x in inputs()]).double()
    weight = torch.randn(1, 5, 32, dtype=torch.float64)

    def first(score_BOn: Tensor, low: int, high: int) -> Tensor:
        return torch.ones_like(score_BOn, dtype=torch.bool) if low else torch.zeros_like(score_BOn, dtype=torch.bool)

    hessian = moment(x)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64))
    found = solve(weight, hessian[None], Choice(first, 1)).codes_BOI[0]
    torch.testing.assert_close(found, weight[0] - weight[0, :, :1] * inverse[:1] / inverse[0, 0], rtol=1e-10, atol=1e-12)


def test_blocks_are_refused() -> None:
    with pytest.raises(AerogelError, match="sparsegpt: blocks such as 32x32 are not pruned by it; give magnitude, wanda or ria, or N:M"):
        Sparsegpt(pattern="32x32")


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"block_size": 8}])
def test_outputs_are_closer_than_with_the_same_zeros_alone(options: dict[str, object]) -> None:
    seen = visit(Sparsegpt(**options))  # type: ignore[arg-type]
    for name in ("left", "right"):
        alone = float((seen.x @ (seen.before[name] * ~seen.kept(name)).T).square().sum())
        assert seen.error(name) < alone
        noted = seen.notes[name]["error"] * float((seen.x @ seen.before[name].T).square().sum())
        assert noted == pytest.approx(seen.error(name), rel=1e-2)


def test_choices_that_see_the_errors_before_them_are_better() -> None:
    xs = inputs(width=128, calls=12)
    errors = {size: visit(Sparsegpt(block_size=size, ignore=("behind",)), xs, Cell(128)).error("right") for size in (32, 128)}
    assert errors[32] < errors[128]


def test_more_zeros_cost_more() -> None:
    errors = [visit(Sparsegpt(sparsity)).error("left") for sparsity in (0.3, 0.5, 0.7)]
    assert errors == sorted(errors)


def test_layers_with_the_same_input_have_thresholds_of_their_own() -> None:
    """As if each were alone; left has weights a hundred times as large."""
    torch.manual_seed(0)
    large = Cell().left.weight.detach() * 100
    both, alone = visit(Sparsegpt(), left=large), visit(Sparsegpt(ignore=("right",)), left=large)
    assert torch.equal(both.kept("left"), alone.kept("left"))
    assert all(note["sparsity"] == 0.5 for note in both.notes.values())


def test_inputs_that_were_always_zero_go_first() -> None:
    dead = torch.ones(32)
    dead[[3, 4, 20]] = 0
    seen = visit(Sparsegpt(0.3), inputs(scale=dead))
    assert not seen.kept("left")[:, [3, 4, 20]].any()
    assert seen.notes["left"]["sparsity"] == pytest.approx(0.3, abs=1 / 384)


def test_zeros_of_an_earlier_step_stay() -> None:
    torch.manual_seed(0)
    weight = Cell().left.weight.detach()
    zeros = torch.rand(weight.shape) < 0.25

    class Twice:
        def compress(self, block: object) -> None:
            block.prune("left", ~zeros)  # type: ignore[attr-defined]
            Sparsegpt(0.5).compress(block)  # type: ignore[arg-type]

    seen = visit(Twice())
    assert not seen.weight("left")[zeros].any()
    assert seen.notes["left"]["sparsity"] == 0.5


def test_what_no_token_reached_is_pruned_by_magnitude() -> None:
    seen = visit(Sparsegpt(0.5))
    was = seen.before["idle"]
    assert torch.equal(seen.weight("idle").flatten(), was.flatten().index_fill(0, was.abs().flatten().argsort()[: was.numel() // 2], 0))
    assert "no token reached it" in seen.notes["idle"]["fallback"]


@pytest.mark.parametrize("scheme", ["W4A16_G16", "W4A16_G16_ASYM", "W3A16_CHANNEL", "NVFP4A16"])
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5, "pattern": "2:4"}])
@pytest.mark.parametrize("act_order", ["none", "static"])
def test_what_stays_is_rounded_in_the_same_pass(scheme: str, options: dict[str, object], act_order: Any) -> None:
    seen = visit(Sparsegpt(scheme=scheme, act_order=act_order, ignore=("behind",), **options))  # type: ignore[arg-type]
    layer = seen.block.module.get_submodule("left")
    assert isinstance(layer, QuantLinear)
    rounded = layer.dequantized(torch.float32)
    zeros = int((rounded == 0).sum())
    assert zeros >= rounded.numel() // 2
    if "pattern" in options:
        assert ((rounded == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()
    assert seen.notes["left"]["sparsity"] == pytest.approx(zeros / rounded.numel())
    error = float((seen.x @ (rounded - seen.before["left"]).T).square().sum())
    assert seen.notes["left"]["error"] == pytest.approx(error / float((seen.x @ seen.before["left"].T).square().sum()), rel=2e-2)


@pytest.mark.parametrize("apart", [False, True])
def test_rows_are_shared_out_only_where_they_do_not_look_at_each_other(apart: bool) -> None:
    weight = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    shares = [Share.of(Processes(rank=rank, count=2, on_machine=2), weight, apart) for rank in range(2)]
    assert [share.by_rows for share in shares] == [apart] * 2
    assert [weight[share.problems, share.rows].numel() for share in shares] == ([96, 96] if apart else [0, 192])


@pytest.mark.parametrize("choice", [Choice(smallest_of([[(slice(0, 24), 0.5)]]), 32), Choice(pattern_of(2, 4), 4)], ids=["half", "2:4"])
def test_ranges_of_what_stays_lose_less_than_those_of_all_weights(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of a group is made when its turn comes, for the weights that are left and have moved by then."""
    losses: dict[bool, float] = {}
    for late in (True, False):
        if not late:
            monkeypatch.setattr(sparsegpt, "fits_on_the_way", lambda *_: False)
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
            weight = torch.randn(1, 24, 64, generator=generator)
            rounding = Rounding(Scheme.parse("W4A16_G16").weights, torch.float32, [None], "none")
            losses[late] = losses.get(late, 0.0) + float(solve(weight, (x.T @ x / 256)[None], choice, rounding=rounding).loss_BO.sum())
    assert losses[True] < losses[False]


def convolved(layer: nn.Conv2d, name: str, **options: object) -> tuple[Network, Tensor]:
    """A block of one convolution pruned by a criterion, and what it reads."""
    torch.manual_seed(0)
    x = torch.randn(4, layer.in_channels, 7, 7, generator=torch.Generator().manual_seed(1)) @ torch.randn(7, 7)
    network = open_model(nn.Sequential(layer))
    step = {name: {"sparsity": 0.6, "targets": ["Conv2d"], **options}}
    return compress(network, {"steps": [step]}, samples=[Call((x,))], measures=()).network, x


def test_a_convolution_is_a_matrix_of_its_patches() -> None:
    """The kernel of one place is a linear layer over pixels; a larger one costs its output less than zeros of the same magnitude do."""
    torch.manual_seed(0)
    point, kernel = nn.Conv2d(6, 10, 1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
    weight = point.weight.detach()[..., 0, 0].clone()
    network, x = convolved(point, "sparsegpt")
    expected = literal(weight, moment(x.movedim(1, -1).reshape(-1, 6)), 0.6)
    torch.testing.assert_close(network.module[0].weight[..., 0, 0].double(), expected, rtol=1e-3, atol=1e-4)  # type: ignore[index,union-attr]
    wanted, lost = kernel(x).detach(), {}
    for name in ("magnitude", "sparsegpt"):
        pruned = convolved(copy.deepcopy(kernel), name)[0].module
        assert int((pruned[0].weight == 0).sum()) == round(0.6 * 10 * 54)  # type: ignore[index,union-attr]
        lost[name] = float((pruned(x).detach() - wanted).square().sum())
    assert lost["sparsegpt"] < 0.9 * lost["magnitude"]


def test_groups_of_a_convolution_have_no_common_hessian() -> None:
    with pytest.raises(AerogelError, match="sparsegpt: reaches no layer of this model"):
        convolved(nn.Conv2d(6, 6, 3, groups=2), "sparsegpt")
