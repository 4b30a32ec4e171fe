"""DyCoke on networks: clips of a prompt by their grid, images whole."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.tokens.dycoke import Dycoke
from aerogel.numerics.video_tokens import dycoke
from tests.methods.tokens.clip_calls import clip_call, require_rule
from tests.tiny import FAMILIES, opened

MATRIX = {"options": {"frames": 2}}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_clips_are_reduced_by_the_rule(name: str) -> None:
    """Of four frames of eight tokens, 8 + 3 x 2 stay; of six, 8 + 2 more."""
    require_rule(Dycoke(keep=0.3), Dycoke(keep=1.0), (14, 24), lambda x_FPC, _: dycoke(x_FPC, 0.3), name)


def test_images_are_no_clips_unless_they_are_said_to_be() -> None:
    network, calls = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)
    (reason,) = Dycoke().unsuitable(network, calls)
    assert reason.startswith("the calibration data has no clip with a grid (video_grid_thw); give chats with videos by --data")
    assert list(Dycoke(frames=2).unsuitable(network, calls)) == []
    assert list(Dycoke().unsuitable(network, [clip_call()])) == []


@pytest.mark.parametrize(("frames", "share"), [(2, (4 + 1) / 8), (4, (2 + 0) / 8)])
def test_the_share_that_is_computed_is_in_the_state(frames: int, share: float) -> None:
    network, calls = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)
    assert Dycoke(frames=frames).calibrate(network, calls).kept == pytest.approx(share)


def test_beams_keep_the_clips_of_their_prompt() -> None:
    """Each row is there three times, and the vision tower has read its clip once."""
    network, call = opened("qwen2_5_vl"), clip_call()
    method = Dycoke(keep=0.3)
    given = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with method.on(network, method.calibrate(network, [call])):
        made = network.module.generate(**given, **settings, num_beams=3)
        alone = network.module.generate(**given, **settings, num_return_sequences=1, num_beams=1, output_scores=True)
        forced = network.module(**{**call.kwargs, "use_cache": True}).past_key_values.layers[0].keys
    assert made.sequences.shape == alone.sequences.shape
    held = made.past_key_values.layers[0].keys
    assert held.shape[2] == forced.shape[2] + 2
    for row in range(2):  # the prompt's keys are those of a forward without beams, in every beam
        for beam in range(3):
            torch.testing.assert_close(held[3 * row + beam, :, : forced.shape[2]], forced[row])


def test_a_search_sets_budgets_of_all_tokens() -> None:
    assert Dycoke.strength(0.475) == {"keep": 0.3}
    assert Dycoke.strength(0.1) == {"keep": 0.0}
