"""FastVID on networks: by attention in the tower where there is no pooling head, by the head's where there is one."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.video_tokens.fastvid import Fastvid
from aerogel.numerics.video_tokens import Fastvid as Settings
from aerogel.numerics.video_tokens import fastvid
from tests.methods.tokens.staged import seen
from tests.methods.video_tokens.clip_calls import require_rule
from tests.runtime.tokens.test_vision_tower import siglip
from tests.tiny import FAMILIES, opened

MATRIX = {"options": {"frames": 2, "keep": 0.5, "contextual": 0.0}}


@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)])
def test_clips_are_reduced_by_the_rule(name: str) -> None:
    """Two of eight tokens stay by attention; a segment has an anchor a frame, but of five frames two times two in every fourth."""
    method, settings = Fastvid(keep=0.4, segments=2, threshold=0.0), Settings(keep=0.4, segments=2, threshold=0.0)
    require_rule(method, Fastvid(keep=1.0), (12, 17), lambda x_FPC, at_FP: fastvid(x_FPC, x_FPC.mean(1), at_FP, settings), name)


def test_a_pooling_head_says_what_stays() -> None:
    network, call = siglip(), FAMILIES["llava"].calls(1)[0]
    head = network.module.model.vision_tower.head
    for salient in range(4):  # whatever the head attends to
        with torch.no_grad():
            head.probe.copy_(torch.randn(head.probe.shape, generator=torch.Generator().manual_seed(salient)))
        stage, selection = seen(network, call, Fastvid(frames=1, keep=0.25, contextual=0.0))[0]
        tower = stage.tower
        assert tower is not None
        assert tower.head_IL is not None
        assert selection is not None
        for row in range(2):
            kept_V = selection.keep_BK[row, stage.vision_BK[row]]
            assert kept_V.nonzero()[:, 0].tolist() == [int(tower.head_IL[row].argmax())]


def test_frames_without_a_grid_have_attention_of_their_own_also_with_beams() -> None:
    """Two rows of a tower with square images, three beams each."""
    network, call = opened("internvl"), FAMILIES["internvl"].calls(1)[0]
    method = Fastvid(frames=2, keep=0.5, contextual=0.0)
    given = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    with method.on(network, method.calibrate(network, [call])):
        forced = network.module(**{**call.kwargs, "use_cache": True}).past_key_values.layers[0].keys
        made = network.module.generate(**given, max_new_tokens=2, num_beams=3, pad_token_id=0, return_dict_in_generate=True)
    held = made.past_key_values.layers[0].keys
    for row in range(2):
        for beam in range(3):
            torch.testing.assert_close(held[3 * row + beam, :, : forced.shape[2]], forced[row])
