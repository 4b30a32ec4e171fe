"""Clips are found by the grid of a model's inputs, in prompts with images and padding, or by a number of frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.runtime.tokens.clips import Clip, clips_of
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Stage
from aerogel.runtime.tokens.vision_tower import VisionTower
from tests.methods.video_tokens.clip_calls import VIDEO_TOKEN, clip_call
from tests.tiny import FAMILIES, opened


def found(name: str, call: Call, frames: int = 0) -> list[Clip]:
    """The clips before the first block of a tiny network."""
    network, seen = opened(name), []
    decoder = decoder_of(network)
    rules: Any = {0: lambda stage: seen.append(clips_of(stage, frames))}
    with Shortening(network, decoder, rules, tower=VisionTower.of(network, decoder)).on():
        network.run(call)
    return seen[0]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_a_grid_says_which_positions_are_a_frame(name: str, image: bool) -> None:
    call = clip_call(image=image, times=name == "qwen3_vl_moe")
    clips = found(name, call)
    assert [(clip.row, tuple(clip.at_FP.shape)) for clip in clips] == [(0, (4, 8)), (1, (6, 8))]
    for clip, ids_N in zip(clips, call.kwargs["input_ids"], strict=True):
        assert clip.at_FP.flatten().tolist() == (ids_N == VIDEO_TOKEN).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("name", "frames"), [("llava", 2), ("internvl", 4), ("qwen2_5_vl", 4)])
def test_image_tokens_are_frames_where_they_are_said_to_be(name: str, frames: int) -> None:
    call = FAMILIES[name].calls(1)[0]
    clips = found(name, call, frames)
    for clip, ids_N in zip(clips, call.kwargs["input_ids"], strict=True):
        image = (ids_N == 120).nonzero()[:, 0]
        assert torch.equal(clip.at_FP, image.view(frames, -1))
    assert found(name, call) == []
    one_over = found(name, call, 3) if name == "llava" else []
    assert all(clip.at_FP.shape == (3, 1) for clip in one_over)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AerogelError, match="a prompt has 8 image tokens, which are not 3 frames of equal size; set the option frames"):
        found("qwen2_5_vl", FAMILIES["qwen2_5_vl"].calls(1)[0], 3)
    network, seen = opened("qwen2_5_vl"), []
    decoder = decoder_of(network)
    with Shortening(network, decoder, {0: seen.append}, tower=VisionTower.of(network, decoder)).on():  # type: ignore[dict-item]
        network.run(clip_call())
    stage: Stage = seen[0]
    assert stage.tower is not None
    for grid in ([[4, 4, 8], [5, 4, 8]], [[6, 4, 8], [4, 4, 8]], [[10, 4, 8]], [[2, 4, 8], [3, 4, 8]]):
        tower = replace(stage.tower, grid_N3=torch.tensor(grid))
        with pytest.raises(AerogelError, match="at most in one, and they do not fit the 80 video tokens of 2 prompts"):
            clips_of(replace(stage, tower=tower), 0)
    with pytest.raises(AerogelError, match="is given no grid of a video; say by the option frames"):
        clips_of(replace(stage, tower=None), 0)
