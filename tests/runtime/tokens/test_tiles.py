"""Images that are read as tiles, with separators between their lines, and videos whose features are pooled (LLaVA-NeXT, OneVision)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.engine.requirements import unmet_by_calls
from aerogel.errors import AerogelError
from aerogel.methods.tokens.dart import Dart
from aerogel.methods.tokens.divprune import Divprune
from aerogel.methods.tokens.downsampling import Downsampling
from aerogel.methods.tokens.fastv import Fastv
from aerogel.methods.tokens.random_tokens import RandomTokens
from aerogel.methods.tower_tokens.fastervlm import Fastervlm
from aerogel.methods.tower_tokens.tome import Tome
from aerogel.methods.video_tokens.dycoke import Dycoke
from aerogel.methods.video_tokens.fastvid import Fastvid
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.video_tokens import dycoke
from aerogel.recipe import Recipe
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.grids import grids_of
from aerogel.runtime.tokens.images import image_path_of
from aerogel.runtime.tokens.separators import separators
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Stage
from aerogel.runtime.tokens.vision_tower import TowerPass, VisionTower
from tests.methods.tokens.staged import generated, seen
from tests.tiny import IMAGE_TOKEN, TINY, opened
from tests.tiny_vision import TILED, VIDEO_TOKEN

SIDES = {"llava_next": [[(2, 2), (4, 2)], [(2, 2), (2, 4)]], "llava_onevision": [[(3, 3), (6, 4)], [(3, 3), (3, 6)]]}
"""Rows and columns of tokens of the whole image and of its tiles, by row of the batch."""
NAMES = sorted(TILED)


def first_stage(network: Network, call: Call) -> Stage:
    found: list[Stage] = []
    with Shortening(network, decoder_of(network), {0: found.append}).on():  # type: ignore[dict-item]
        network.run(call)
    return found[0]


def lines(name: str, row: int, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the features of an image, and of its separators, counted from its size alone."""
    place_V = (ids_N == IMAGE_TOKEN).nonzero()[:, 0]
    (side, _), (height, width) = SIDES[name][row]
    ends_V = side * side + torch.arange(1, height + 1) * (width + 1) - 1
    is_end_V = torch.isin(torch.arange(len(place_V)), ends_V)
    return place_V[~is_end_V], place_V[is_end_V]


@pytest.mark.parametrize("name", NAMES)
def test_separators_are_no_image_tokens(name: str) -> None:
    network, call = opened(name), TINY[name].calls(2)[1]
    assert separators(network, decoder_of(network)) == ("model.image_newline",)
    stage = first_stage(network, call)
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        features_V, ends_V = lines(name, row, ids_N)
        assert torch.equal(stage.vision_BK[row].nonzero()[:, 0], features_V)
        assert torch.equal(stage.separator_BN[row].nonzero()[:, 0], ends_V)
        assert int(stage.vision_total_B[row]) == len(features_V)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_other_models_have_none(name: str) -> None:
    network = opened(name)
    assert separators(network, decoder_of(network)) == ()


@pytest.mark.parametrize("method", [RandomTokens(keep=3), Divprune(keep=3), Fastv(keep=3, layer=1), Dart(keep=3, layer=1, exact=True)])
def test_budgets_are_of_features_and_separators_stay(method: Any) -> None:
    network, call = opened("llava_next"), TINY["llava_next"].calls(2)[1]
    with method.on(network, method.calibrate(network, [call])):
        gone_BN = network.run(call).logits.isnan().any(-1)
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        features_V, _ = lines("llava_next", row, ids_N)
        assert set(gone_BN[row].nonzero()[:, 0].tolist()) <= set(features_V.tolist())
        assert int(gone_BN[row].sum()) == len(features_V) - 3


def test_separators_are_no_pivots_of_text() -> None:
    """However large their keys are."""
    network, call = opened("llava_next"), TINY["llava_next"].calls(1)[0]
    method, given = Dart(keep=3, layer=1, image_pivots=1, text_pivots=1), []
    object.__setattr__(method, "chosen", lambda *parts: given.append(parts) or parts[2])
    seen(network, call, method)
    for row, (_, _, vision_K, text_K, _) in enumerate(given):
        features_V, ends_V = lines("llava_next", row, call.kwargs["input_ids"][row])
        assert torch.equal(vision_K.nonzero()[:, 0], features_V)
        assert not text_K[ends_V].any()
        assert text_K[int(ends_V[-1]) + 1 :].all()


@pytest.mark.parametrize("name", NAMES)
def test_grids_of_the_whole_image_and_of_its_tiles(name: str) -> None:
    network, call = opened(name), TINY[name].calls(2)[1]
    stage = first_stage(network, call)
    grids = list(grids_of(stage.vision_BK, stage.inputs, stage.separator_BN))
    assert [(grid.row, grid.height, grid.width) for grid in grids] == [
        (row, *sides) for row, images in enumerate(SIDES[name]) for sides in images
    ]
    for row in (0, 1):
        features_V, _ = lines(name, row, call.kwargs["input_ids"][row])
        assert torch.equal(torch.cat([grid.place_P for grid in grids if grid.row == row]), features_V)


def test_downsampling_averages_the_whole_image_and_its_tiles_apart() -> None:
    network, call = opened("llava_onevision"), TINY["llava_onevision"].calls(2)[1]
    stage, selection = seen(network, call, Downsampling(keep=0.5))[0]
    assert selection is not None
    assert not (~selection.keep_BK & ~stage.vision_BK).any()
    for row, counts in enumerate(((2 * 2, 5 * 2), (2 * 2, 3 * 3))):  # at most 16 of 9 + 24, 14 of 9 + 18
        features_V, _ = lines("llava_onevision", row, call.kwargs["input_ids"][row])
        kept_V = selection.keep_BK[row, features_V]
        assert (int(kept_V[:9].sum()), int(kept_V[9:].sum())) == counts


def test_two_images_without_text_between_have_grids_of_their_own() -> None:
    """A narrow one, a single square, and a wide one; lines of unlike length are none."""
    kinds = "ffff ffs ffs ffs ffs  ffffs  ffff ffffs ffffs".replace(" ", "")
    vision_BN, separator_BN = (torch.tensor([[kind == letter for kind in kinds]]) for letter in "fs")
    sides = [(grid.height, grid.width) for grid in grids_of(vision_BN, {}, separator_BN)]
    assert sides == [(2, 2), (4, 2), (2, 2), (2, 2), (2, 4)]
    with pytest.raises(AerogelError, match="an image of 5 tokens is no grid of 2 x 2; choose a rule that needs no grid"):
        list(grids_of(torch.tensor([[True] * 5 + [False]]).repeat(1, 2), {}, torch.tensor([[False] * 5 + [True]]).repeat(1, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_choices_at_the_projector_go_where_their_tiles_go(name: str) -> None:
    """What stays is what the model's own packing makes of a mask of the tiles."""
    network, call, keep = opened(name), TINY[name].calls(2)[1], []

    class Look(Fastervlm):
        def choose(self, image: Any) -> Any:
            chosen = super().choose(image)
            assert chosen is not None
            keep.append(chosen.keep_P)
            return chosen

    method = Look(keep=2)
    state = method.fitted(network, [call])
    with method.on(network, state):
        gone_BN = network.run(call).logits.isnan().any(-1)
    model = network.module.model
    mask_TPC = torch.stack(keep)[..., None].float().expand(-1, -1, 64)
    packed, _ = model.pack_image_features(mask_TPC.split([5, 3]), call.kwargs["image_sizes"], image_newline=torch.ones(64), **packing(name))
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        assert torch.equal(~gone_BN[row, ids_N == IMAGE_TOKEN], packed[row][:, 0] == 1)
        side = SIDES[name][row][0][0]
        assert int(packed[row][: side**2, 0].sum()) == 2


def packing(name: str) -> dict[str, Any]:
    return {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}


def video(frames: int = 2) -> Call:
    """Two prompts with a clip each, 2 x 2 tokens a frame and a separator behind the last."""
    random = torch.Generator().manual_seed(0)
    words = torch.randint(3, 112, (2, 12), generator=random)
    clip = torch.full((2, 4 * frames + 1), VIDEO_TOKEN)
    ids = torch.cat([words[:, :4], clip, words[:, 4:]], dim=1)
    pixels = torch.randn(2, frames, 3, 24, 24, generator=random)
    return Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels})


@pytest.mark.parametrize("method", [Fastervlm(keep=2), Tome(keep=4)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("pooled", ["video", "image"])
def test_features_that_are_mixed_behind_the_projector_cannot_be_chosen_there(pooled: str, method: Any) -> None:
    """The model averages those of a video, and those of an image of more tiles than it was made for."""
    network = opened("llava_onevision")
    state = method.calibrate(network, TINY["llava_onevision"].calls(1))
    call = video()
    if pooled == "image":
        network.config.vision_aspect_ratio = "anyres_max_1"
        call = TINY["llava_onevision"].calls(1)[0]
        for row, count in enumerate((18, 19)):  # 3 x 2 and 2 x 4 tokens are left of the tiles, and separators
            spare = int((call.kwargs["input_ids"][row] == IMAGE_TOKEN).sum()) - count
            place = (call.kwargs["input_ids"][row] == IMAGE_TOKEN).nonzero()[:spare, 0]
            call.kwargs["input_ids"][row, place] = 5
    dense = network.run(call).logits
    with method.on(network, state), pytest.raises(AerogelError, match="makes one token of several features behind its projector"):
        network.run(call)
    assert torch.equal(network.run(call).logits, dense)
    later = Divprune(keep=2)
    with later.on(network, later.calibrate(network, [call])):
        assert network.run(call).logits.isnan().any()


@pytest.mark.parametrize("rule", ["fastervlm", "tome"])
def test_a_plan_refuses_them_for_videos(rule: str) -> None:
    network = opened("llava_onevision")
    recipe = Recipe.parse({"steps": [{rule: {"keep": 2}}]})
    (reason,) = unmet_by_calls(network, recipe, [video()])
    assert reason.startswith(f"{rule}: this llava_onevision model makes one token of several features behind its projector")
    assert list(unmet_by_calls(network, recipe, TINY["llava_onevision"].calls(1))) == []


def test_clips_of_pooled_frames() -> None:
    """Their separator is no token of a frame, and what a token receives is pooled as it is."""
    network, call = opened("llava_onevision"), video()
    method = Dycoke(keep=0.3, frames=2)
    stage, selection = seen(network, call, method)[0]
    assert selection is not None
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        place_V = (ids_N == VIDEO_TOKEN).nonzero()[:-1, 0]
        reduced = dycoke(stage.hidden_BKC[row, place_V].view(2, 4, -1), 0.3)
        assert torch.equal(selection.keep_BK[row, place_V].view(2, 4), reduced.keep_FP)
        assert selection.keep_BK[row, int(place_V[-1]) + 1]
    dense = generated(network, call)
    whole = Dycoke(keep=1.0, frames=2)
    with whole.on(network, whole.calibrate(network, [call])):
        assert torch.equal(torch.stack(generated(network, call).logits), torch.stack(dense.logits))


def test_beams_have_the_attention_of_their_clip() -> None:
    """The vision tower has read two clips of three frames; the prompts are there three times each."""
    network, call = opened("llava_onevision"), video(3)
    method = Fastvid(frames=3, keep=0.5, contextual=0.0)
    with method.on(network, method.calibrate(network, [call])):
        forced = network.module(**call.kwargs, use_cache=True).past_key_values.layers[0].keys
        held = generated(network, call, 2, num_beams=3).past_key_values.layers[0].keys
    assert forced.shape[2] == 12 + 3 * 2 + 1
    torch.testing.assert_close(held[:, :, : forced.shape[2]], forced.repeat_interleave(3, dim=0))


def test_attention_to_patches_becomes_that_to_pooled_tokens() -> None:
    network, call = opened("llava_onevision"), video()
    passes: list[TowerPass] = []
    path = image_path_of(network, call)
    with VisionTower.of(network, decoder_of(network), path.attention, path.class_token).watching(network, passes.append):
        network.run(call)
    (received_IL,) = passes[0].received
    pooled = torch.nn.functional.interpolate(received_IL.view(4, 1, 3, 3), size=(2, 2), mode="bilinear")
    torch.testing.assert_close(passes[0].received_by_tokens(16), pooled.flatten())


def test_tiles_are_no_frames() -> None:
    network, call = opened("llava_next"), TINY["llava_next"].calls(1)[0]
    with pytest.raises(AerogelError, match="2 frames of 6 image tokens each would go across text or separators"):
        Dycoke(frames=2).calibrate(network, [call])
