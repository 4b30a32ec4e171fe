"""Wanda: the formula row by row, what its masks do not depend on, its variant, convolutions, and experts that no token reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.sparsity.wanda import Wanda, kept_by_sum
from aerogel.model.calls import Call
from tests.methods.sparsity.cells import Cell, Images, inputs, visit
from tests.tiny import FAMILIES

MATRIX = {"options": {"sparsity": 0.02}}  # which moves a network of random weights by less than eight bits do


def literal(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """The paper's mask of what is kept."""
    score = weight.abs().double() * x.double().norm(dim=0)
    kept = torch.ones_like(score, dtype=torch.bool)
    for row, scores in enumerate(score):
        kept[row, scores.argsort(stable=True)[: int(len(scores) * sparsity)]] = False
    return kept


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_each_output_loses_its_lowest_scores(sparsity: float) -> None:
    seen = visit(Wanda(sparsity))
    for name in ("left", "right"):
        kept = literal(seen.before[name], seen.x, sparsity)
        assert torch.equal(seen.weight(name), seen.before[name] * kept)
        assert seen.notes[name]["sparsity"] == pytest.approx(int(32 * sparsity) / 32)


def test_layers_behind_are_scored_by_what_the_unpruned_layers_give() -> None:
    seen = visit(Wanda(0.5))
    torch.manual_seed(0)
    before = Cell()
    behind = torch.cat([before.left(seen.x), before.right(seen.x).relu()], -1)
    assert torch.equal(seen.kept("behind"), literal(seen.before["behind"], behind.detach(), 0.5))


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_a_pattern_keeps_the_highest_scores_of_every_few(pattern: str, kept: int, of: int) -> None:
    seen = visit(Wanda(1 - kept / of, pattern))
    score = (seen.before["left"].abs() * seen.x.norm(dim=0)).unflatten(-1, (-1, of))
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(kept).indices, True).flatten(-2)
    assert torch.equal(seen.kept("left"), expected)


def test_what_a_mask_does_not_depend_on() -> None:
    """The scale of all inputs, the scale of an output's weights; equal norms leave magnitudes; a large input is kept everywhere."""
    xs = inputs()
    plain = visit(Wanda(0.5), xs)
    assert torch.equal(plain.kept("left"), visit(Wanda(0.5), [1000 * x for x in xs]).kept("left"))
    scaled = visit(Wanda(0.5), xs, left=plain.before["left"] * torch.rand(12, 1).add(0.5))
    assert torch.equal(plain.kept("left"), scaled.kept("left"))
    signs = visit(Wanda(0.5), [x.sign() for x in xs])
    assert torch.equal(signs.kept("left"), literal(signs.before["left"], torch.ones(1, 32), 0.5))
    large = torch.ones(32)
    large[5] = 1000
    assert visit(Wanda(0.9), [x * large for x in xs]).kept("left")[:, 5].all()


def test_masks_nest() -> None:
    less, more = visit(Wanda(0.3)), visit(Wanda(0.6))
    assert (less.kept("left") | ~more.kept("left")).all()


def test_inputs_of_different_size_make_it_better_than_magnitude() -> None:
    """Exactly what it is for: the output's error, with inputs whose scales differ."""
    for seed in range(5):
        scale = torch.randn(32, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()
        xs = inputs(scale=scale, seed=seed)
        seen = visit(Wanda(0.5), xs)
        by_magnitude = literal(seen.before["left"], torch.ones(1, 32), 0.5)
        error = float((seen.x @ (seen.before["left"] * ~by_magnitude).T).square().sum())
        assert seen.error("left") < 0.5 * error


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8, 0.95])
def test_the_variant_finds_the_share(sparsity: float) -> None:
    score = torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) ** 3
    kept = kept_by_sum(score, sparsity)
    assert float((~kept).float().mean()) == pytest.approx(sparsity, abs=0.001)
    # One alpha for all rows: no row could lose another weight with less of its sum than every row has lost.
    lost = (score * ~kept).double().sum(1) / score.double().sum(1)
    after = lost + score.masked_fill(~kept, torch.inf).amin(1).double() / score.double().sum(1)
    assert float(lost.max()) <= float(after.min())


def test_the_variant_prunes_a_layer_with_shares_that_differ() -> None:
    seen = visit(Wanda(0.5, variant=True))
    shares = (~seen.kept("right")).float().mean(1)
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)  # 640 weights
    assert len(shares.unique()) > 1


def test_a_layer_that_no_token_reached_is_pruned_by_magnitude() -> None:
    seen = visit(Wanda(0.5))
    assert torch.equal(seen.kept("idle"), literal(seen.before["idle"], torch.ones(1, 32), 0.5))
    assert [name for name, note in seen.notes.items() if "no token reached it" in note.get("fallback", "")] == ["idle"]


def test_convolutions_are_scored_by_their_patches() -> None:
    xs = [torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    torch.manual_seed(0)
    module = Images()
    mid = torch.cat([(module.first(x) + module.short(x)).detach() for x in xs])
    seen = visit(Wanda(0.5, targets=("Conv2d",)), xs, module)

    def norms(x: Tensor, size: int, **window: Any) -> Tensor:
        """The norm of what a kernel's place meets: the square root of the squared image convolved with a kernel that picks the place."""
        picks = torch.eye(size * size).view(-1, 1, size, size).repeat(x.shape[1], 1, 1, 1)
        return conv2d(x.square(), picks, groups=x.shape[1], **window).sum((0, 2, 3)).sqrt()

    whole = torch.cat(xs)
    for name, norm in (("first", norms(whole, 3, padding=1)), ("short", norms(whole, 1))):
        assert torch.equal(seen.kept(name), literal(seen.before[name], norm[None], 0.5)), name
    halves = [
        literal(part, norms(mid, 3, stride=2)[None, 27 * at : 27 * at + 27], 0.5) for at, part in enumerate(seen.before["grouped"].split(4))
    ]
    assert torch.equal(seen.kept("grouped"), torch.cat(halves))


def test_experts_are_scored_by_their_own_tokens() -> None:
    """One token goes to two of four experts; the other two are pruned by magnitude, and the journal says so."""
    call = Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})
    with pytest.warns(UserWarning, match="no token reached it"):
        result = aerogel.compress(FAMILIES["qwen3_moe"].build(), {"steps": [{"wanda": {}}]}, samples=[call], measures=())
    experts = [entry for entry in result.journal if ".experts." in entry["name"]]
    assert sum("no token" in str(entry.get("fallback")) for entry in experts) == len(experts) // 2 > 0
    assert all(entry["sparsity"] == 0.5 for entry in experts)


def test_whole_blocks_go_by_the_sum_of_their_scores_among_those_of_the_same_outputs() -> None:
    seen = visit(Wanda(0.5, "4x4"))
    score = seen.before["left"].abs() * seen.x.norm(dim=0)
    for row, kept in zip(score.split(4), seen.kept("left").split(4), strict=True):
        sums = [float(part.sum()) for part in row.split(4, dim=1)]
        stays = [place for place, part in enumerate(kept.split(4, dim=1)) if bool(part.all())]
        assert sum(bool(part.any()) for part in kept.split(4, dim=1)) == len(stays) == len(sums) // 2
        assert sorted(sums)[len(sums) // 2 :] == sorted(sums[place] for place in stays)


def test_a_variant_has_no_pattern() -> None:
    with pytest.raises(AerogelError, match="wanda: 2:4 has the same share in every output; leave variant or pattern out"):
        Wanda(0.5, "2:4", variant=True)
