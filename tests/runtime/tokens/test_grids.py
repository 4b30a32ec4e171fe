"""Grids of images and of frames, in prompts with both: each kind by its own grid, whatever the order."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.methods.tokens.downsampling import Downsampling
from aerogel.model.calls import Call
from aerogel.runtime.tokens.grids import Grid, grids_of
from tests.methods.tokens.staged import generated, seen
from tests.methods.video_tokens.clip_calls import VIDEO_TOKEN, clip_call
from tests.tiny import IMAGE_TOKEN, opened


def of_call(call: Call) -> list[Grid]:
    ids_BN = call.kwargs["input_ids"]
    video_BN = ids_BN == VIDEO_TOKEN
    return list(grids_of(video_BN | (ids_BN == IMAGE_TOKEN), call.kwargs, None, video_BN))


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (4, 4)])
def test_images_and_frames_have_sides_of_their_own(shape: tuple[int, int], times: bool) -> None:
    """An image of 2 x 4 tokens before a clip of four frames, then one before six; `times` puts text between frames."""
    call = clip_call(4, *shape, image=True, times=times)
    height, width = shape[0] // 2, shape[1] // 2
    grids = of_call(call)
    sides = [(grid.row, grid.height, grid.width) for grid in grids]
    assert sides == [(0, 2, 4), *[(0, height, width)] * 4, (1, 2, 4), *[(1, height, width)] * 6]
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        places = torch.cat([grid.place_P for grid in grids if grid.row == row])
        assert torch.equal(places, ((ids_N == VIDEO_TOKEN) | (ids_N == IMAGE_TOKEN)).nonzero()[:, 0])


def test_an_image_next_to_a_clip_without_text_between_is_one() -> None:
    ids_BN = torch.tensor([[5, *[IMAGE_TOKEN] * 8, *[VIDEO_TOKEN] * 8, 5]])
    call = Call((), {"input_ids": ids_BN, "image_grid_thw": torch.tensor([[1, 4, 8]]), "video_grid_thw": torch.tensor([[2, 4, 4]])})
    assert [(grid.place_P[0], grid.height, grid.width) for grid in of_call(call)] == [(1, 2, 4), (9, 2, 2), (13, 2, 2)]


def test_a_clip_without_a_grid_is_refused_and_no_square() -> None:
    call = Call((), {"input_ids": torch.tensor([[5, *[VIDEO_TOKEN] * 16, 5]])})
    with pytest.raises(AerogelError, match="a video of 16 tokens comes without its grid; choose a rule that needs no grid"):
        of_call(call)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_downsampling_takes_frames_for_frames(name: str) -> None:
    """In a forward, where grids are given, and in generation, where positions say as much."""
    network, call = opened(name), clip_call(image=True, times=name == "qwen3_vl")
    method = Downsampling(keep=0.25)
    stage, selection = seen(network, call, method)[0]
    assert selection is not None
    for row, frames in enumerate((4, 6)):
        place_V = stage.vision_BK[row].nonzero()[:, 0]
        kept_FP = selection.keep_BK[row, place_V].view(frames + 1, 8)
        assert kept_FP.sum(1).tolist() == [2] * (frames + 1)
    with method.on(network, method.calibrate(network, [call])):
        forced = network.module(**{**call.kwargs, "use_cache": True}).past_key_values.layers[0].keys
        held = generated(network, call, 2).past_key_values.layers[0].keys
    torch.testing.assert_close(held[:, :, : forced.shape[2]], forced)
