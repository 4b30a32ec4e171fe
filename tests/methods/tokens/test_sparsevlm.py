"""SparseVLM against its rules written out: raters, counts by rank, groups of what is dropped."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.tokens.sparsevlm import Sparsevlm, raters
from aerogel.numerics.token_selection import density_peaks
from tests.methods.tokens.staged import first_call, generated, seen
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened

MATRIX = {"options": {"layers": [0], "keep": [1], "recycled": 0.0}}


@pytest.mark.parametrize("seed", range(5))
def test_raters_are_text_tokens_that_images_share_themselves_out_to(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    vision_VC, text_TC = torch.randn(5, 8, generator=random), torch.randn(7, 8, generator=random)
    share = [0.0] * 7
    for vision_C in vision_VC:
        weight = [float((vision_C @ text_C).exp()) for text_C in text_TC]
        share = [one + other / sum(weight) / 5 for one, other in zip(share, weight, strict=True)]
    assert raters(vision_VC, text_TC).tolist() == [one > sum(share) / 7 for one in share]
    assert raters(vision_VC, text_TC[:1]).tolist() == [True]


@pytest.mark.parametrize(
    ("rows", "tokens", "scale", "bias", "count"), [(3, 40, 4.0, 0.0, 12), (3, 40, 4.0, 5.9, 17), (3, 40, 13.5, 0.0, 39)]
)
def test_the_rank_of_the_attention_says_how_many_stay(rows: int, tokens: int, scale: float, bias: float, count: int) -> None:
    rating_RV = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0))
    method = Sparsevlm(scale=scale, bias=bias)
    assert method.count(rating_RV) == count
    assert method.count(rating_RV[:1].expand(rows, -1)) == min(int(scale + bias), tokens - 1)
    assert method.count(torch.eye(4)) == 4
    assert method.count(torch.zeros(2, 0)) == 0  # a row without an image


@pytest.mark.parametrize(("dropped", "best", "groups"), [(276, 83, 9), (9, 3, 1), (0, 0, 0), (100, 31, 4)])
def test_groups_of_the_best_of_those_dropped(dropped: int, best: int, groups: int) -> None:
    """int(0.3 n) + 1 tokens in int(that / 10) + 1 groups; each mean is that of the tokens nearest to its centre."""
    random = torch.Generator().manual_seed(dropped)
    hidden_DC, score_D = torch.randn(dropped, 6, generator=random), torch.rand(dropped, generator=random)
    centre_G, mean_GC = Sparsevlm().merged(hidden_DC, score_D)
    assert len(centre_G) == groups
    chosen = sorted(sorted(range(dropped), key=lambda number: -score_D[number])[:best])
    assert set(centre_G.tolist()) <= set(chosen)
    if groups:
        found = density_peaks(hidden_DC[chosen], groups, groups)
        for group, centre in enumerate(found.centre_G.tolist()):
            assert int(centre_G[group]) == chosen[centre]
            members = [chosen[place] for place in (found.group_N == group).nonzero()[:, 0].tolist()]
            torch.testing.assert_close(mean_GC[group], hidden_DC[members].mean(0))


def test_what_raters_attend_to_most_stays_and_a_group_takes_its_centres_place() -> None:
    network, call = first_call("qwen2_5_vl")
    stage, selection = seen(network, call, Sparsevlm(layers=(0,), keep=(2,), group=2))[1]
    assert selection is not None
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        image = (ids_N == IMAGE_TOKEN).nonzero()[:, 0]
        text = [place for place in range(int(image[-1]) + 1, len(ids_N)) if int(ids_N[place]) not in (0, 1, 2, 121, 123)]
        rater_N = stage.memory["sparsevlm raters"][row]
        assert set(rater_N.nonzero()[:, 0].tolist()) <= set(text)
        asking = rater_N.nonzero()[:, 0]
        attention = stage.watched[0].attention(asking.expand(2, -1))[row].mean((0, 1))
        order = sorted(image.tolist(), key=lambda place: -attention[place])
        kept = (selection.keep_BK[row] & (ids_N == IMAGE_TOKEN)).nonzero()[:, 0].tolist()
        # Six are dropped: int(1.8) + 1 = 2 of them in int(2 / 2) + 1 = 2 groups, each by itself.
        assert sorted(order[:4]) == kept
        assert selection.keep_BK[row][ids_N != IMAGE_TOKEN].all()
        same = [place for place in range(len(ids_N)) if torch.equal(selection.hidden_BKC[row, place], stage.hidden_BKC[row, place])]
        assert set(order[:2]) <= set(same)


def test_a_merged_group_is_a_mean_of_what_the_block_gave() -> None:
    network, call = first_call("qwen2_5_vl")
    stage, selection = seen(network, call, Sparsevlm(layers=(0,), keep=(2,), recycled=0.9))[1]
    assert selection is not None
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        changed = (selection.hidden_BKC[row] != stage.hidden_BKC[row]).any(1).nonzero()[:, 0].tolist()
        assert len(changed) == 1  # int(0.9 * 6) + 1 = 6 tokens in one group
        away = [place for place in (ids_N == IMAGE_TOKEN).nonzero()[:, 0].tolist() if not selection.keep_BK[row, place] or place in changed]
        assert len(away) == 6
        torch.testing.assert_close(selection.hidden_BKC[row, changed[0]], stage.hidden_BKC[row, away].mean(0))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_all_tokens_are_kept_at_a_full_budget_and_generation_goes_on_with_fewer(name: str) -> None:
    network, call = opened(name), FAMILIES[name].calls(2)[1]
    dense = generated(network, call)
    for keep, equal in ((1.0, True), (1, False)):
        method = Sparsevlm(layers=(0,), keep=(keep,))
        with method.on(network, method.calibrate(network, [call])):
            made = generated(network, call)
        assert torch.equal(torch.stack(made.logits), torch.stack(dense.logits)) == equal
    held = [layer.keys.shape[2] for layer in made.past_key_values.layers]
    tokens = int((call.kwargs["input_ids"][0] == IMAGE_TOKEN).sum())
    assert held[0] - held[1] == tokens - 1 - 1


def test_budgets_and_blocks_are_as_many() -> None:
    problems = list(Sparsevlm(keep=(0.5,)).problems(opened("llava"), None))  # type: ignore[arg-type]
    assert problems[0] == "keep has 1 budgets for 3 blocks; give one for each, or none"
    assert list(Sparsevlm().problems(opened("llava"), None)) == ["it acts before block 16, and the decoder has blocks 0 to 1"]  # type: ignore[arg-type]


def test_counts_follow_the_rank_of_the_attention_of_a_network() -> None:
    network, call = first_call("qwen2_5_vl")
    stage, selection = seen(network, call, Sparsevlm(layers=(0,), scale=1.0, recycled=0.0))[1]
    assert selection is not None
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        asking = stage.memory["sparsevlm raters"][row].nonzero()[:, 0]
        rating_RV = stage.watched[0].attention(asking.expand(2, -1))[row].mean(0)[:, ids_N == IMAGE_TOKEN]
        rank = int((torch.linalg.svdvals(rating_RV) > 1e-6 * rating_RV.norm()).sum())
        assert 0 < rank < 8
        assert int(selection.keep_BK[row, ids_N == IMAGE_TOKEN].sum()) == rank


def test_a_search_sets_a_budget_for_each_block() -> None:
    assert Sparsevlm.strength(0.125) == {"keep": (0.5, 0.25, 0.125)}
