"""HoliTom on networks: clips before the first block, and the fold inside the decoder."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.video_tokens.holitom import Holitom
from aerogel.numerics.video_tokens import Holitom as Settings
from aerogel.numerics.video_tokens import fold, holitom
from tests.methods.tokens.staged import generated, seen
from tests.methods.video_tokens.clip_calls import VIDEO_TOKEN, clip_call, require_rule
from tests.tiny import opened

MATRIX = {"options": {"frames": 2, "keep": 0.5, "layer": 1}}


@pytest.mark.parametrize("clustered", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_clips_are_reduced_by_the_rule(clustered: float) -> None:
    """Random frames have no static places: ceil(0.3 x 8) of the tokens of each frame stay."""
    settings = Settings(keep=0.3, clustered=clustered)
    method = Holitom(keep=0.3, clustered=clustered, layer=0)
    assert method.reads_attention == (clustered < 1)
    require_rule(method, Holitom(keep=1.0, layer=0), (12, 18), lambda x_FPC, at_FP: holitom(x_FPC, at_FP, settings))


def test_half_of_what_is_left_is_folded_into_the_rest() -> None:
    network, call = opened("qwen2_5_vl"), clip_call(image=True)
    found = seen(network, call, Holitom(keep=0.3, layer=1))
    stage, selection = found[1]
    assert selection is not None
    assert selection.hidden_BKC is not None
    ids_BK = stage.kept.rows(call.kwargs["input_ids"])
    last = int(stage.kind_BK.shape[1]) - 1
    real_BK = stage.kept.real_BK
    for row, count in enumerate((12, 18)):
        clip_K = (ids_BK[row] == VIDEO_TOKEN) & (torch.ones_like(ids_BK[row], dtype=torch.bool) if real_BK is None else real_BK[row])
        place = clip_K.nonzero()[:, 0]
        assert len(place) == count
        asking = last if real_BK is None else int(real_BK[row].nonzero()[-1])
        score = stage.watched[0].attention(torch.tensor([[asking]] * 2))[row].mean((0, 1))
        kept = sorted(sorted(place.tolist(), key=lambda one: -score[one])[: count // 2])
        assert (selection.keep_BK[row] & clip_K).nonzero()[:, 0].tolist() == kept
        folded_NC = fold(stage.hidden_BKC[row, place], selection.keep_BK[row, place])
        assert torch.equal(selection.hidden_BKC[row, kept], folded_NC[selection.keep_BK[row, place]])
        assert selection.keep_BK[row][~clip_K].all()


def test_generation_goes_on_with_both_stages() -> None:
    network, call = opened("qwen2_5_vl"), clip_call()
    dense = generated(network, call)
    for method, equal in ((Holitom(keep=1.0, layer=1, inner_keep=1.0), True), (Holitom(keep=0.3, layer=1), False)):
        with method.on(network, method.calibrate(network, [call])):
            made = generated(network, call)
        assert torch.equal(torch.stack(made.logits), torch.stack(dense.logits)) == equal
    held = [layer.keys.shape[2] for layer in made.past_key_values.layers]
    # 12 of 32 and 18 of 48 tokens stay, then 6 and 9; the first row, which keeps its padding, is the longer one.
    longest = call.kwargs["input_ids"].shape[1] + 4
    assert held == [longest - 32 + 12, longest - 32 + 6]


def test_a_second_stage_beyond_the_decoder_is_refused() -> None:
    network = opened("qwen2_5_vl")
    assert list(Holitom().problems(network, None)) == ["it acts before block 18, and the decoder has blocks 0 to 1"]  # type: ignore[arg-type]
    assert list(Holitom(layer=0).problems(network, None)) == []  # type: ignore[arg-type]


def test_a_search_sets_both_stages() -> None:
    assert Holitom.strength(0.25) == {"keep": 0.5, "inner_keep": 0.5}


def test_a_static_cache_gives_what_a_dynamic_one_does() -> None:
    network, call = opened("qwen2_5_vl"), clip_call()
    method = Holitom(keep=0.3, layer=1)
    with method.on(network, method.calibrate(network, [call])):
        dynamic, static = (torch.stack(generated(network, call, **more).logits) for more in ({}, {"cache_implementation": "static"}))
    torch.testing.assert_close(static, dynamic, rtol=0, atol=1e-5)
