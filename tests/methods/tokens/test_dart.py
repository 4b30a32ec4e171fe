"""DART against its rule written out, and the counts that its division leaves."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from aerogel.methods.tokens.dart import Dart
from tests.methods.tokens.staged import first_call, generated, seen
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened

MATRIX = {"options": {"layer": 1, "image_pivots": 1, "text_pivots": 1}}


@pytest.mark.parametrize(("budget", "realised"), [(192, 188), (128, 124), (64, 60), (3, 3), (576, 576)])
def test_counts_of_576_tokens(budget: int, realised: int) -> None:
    random = torch.Generator().manual_seed(budget)
    state_KC, size_K = torch.randn(620, 8, generator=random), torch.rand(620, generator=random)
    vision_K = (torch.arange(620) >= 10) & (torch.arange(620) < 586)
    text_K = torch.arange(620) >= 586
    for exact, count in ((False, realised), (True, budget)):
        chosen_K = Dart(exact=exact).chosen(state_KC, size_K, vision_K, text_K, budget)
        assert int(chosen_K.sum()) == count
        assert not (chosen_K & ~vision_K).any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_pivot_takes_what_is_least_like_it(seed: int, exact: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    state_KC, size_K = torch.randn(40, 8, generator=random), torch.rand(40, generator=random)
    vision, text = range(4, 30), range(30, 40)
    pivots = sorted(vision, key=lambda place: -size_K[place])[:2]
    order = pivots + sorted(text, key=lambda place: -size_K[place])[:3]
    taken = list(pivots)
    for place, pivot in enumerate(order):
        left = [one for one in vision if one not in taken]
        left.sort(key=lambda one: float(cosine_similarity(state_KC[one], state_KC[pivot], 0)))
        taken += left[: 2 + (exact and place < 1)]  # 13 - 2 = 5 * 2 + 1
    vision_K, text_K = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    vision_K[list(vision)], text_K[list(text)] = True, True
    chosen_K = Dart(image_pivots=2, text_pivots=3, exact=exact).chosen(state_KC, size_K, vision_K, text_K, 13)
    assert chosen_K.nonzero()[:, 0].tolist() == sorted(taken)


def test_pivots_have_the_largest_keys_and_states_are_those_behind_the_final_norm() -> None:
    network, call = first_call("llava")
    found = seen(network, call, Dart(keep=2, layer=1, image_pivots=1, text_pivots=0, exact=True))
    stage, selection = found[1]
    assert selection is not None
    norm = network.module.model.language_model.norm
    assert stage.final_norm is norm
    key_BHKD = stage.watched[0].key_BHSD
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        image = (ids_N == IMAGE_TOKEN).nonzero()[:, 0].tolist()
        pivot = max(image, key=lambda place: float(key_BHKD[row, :, place].abs().sum()))
        state_NC = norm(stage.hidden_BKC[row])
        other = min((one for one in image if one != pivot), key=lambda one: float(cosine_similarity(state_NC[one], state_NC[pivot], 0)))
        assert (selection.keep_BK[row] & (ids_N == IMAGE_TOKEN)).nonzero()[:, 0].tolist() == sorted([pivot, other])
        assert selection.keep_BK[row][ids_N != IMAGE_TOKEN].all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_all_tokens_are_kept_at_a_full_budget_and_generation_goes_on_with_fewer(name: str) -> None:
    network, call = opened(name), FAMILIES[name].calls(2)[1]
    dense = generated(network, call)
    for keep, equal in ((1.0, True), (2, False)):
        method = Dart(layer=1, keep=keep, image_pivots=1, exact=True)
        with method.on(network, method.calibrate(network, [call])):
            made = generated(network, call)
        assert torch.equal(torch.stack(made.logits), torch.stack(dense.logits)) == equal
    held = [layer.keys.shape[2] for layer in made.past_key_values.layers]
    assert held[0] - held[1] == int((call.kwargs["input_ids"][0] == IMAGE_TOKEN).sum()) - 2
