"""EVS on networks: clips of a prompt by their grid and with the features that vLLM compares, images whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from aerogel.errors import AerogelError
from aerogel.methods.video_tokens.evs import Evs
from aerogel.numerics.video_tokens import Reduced, evs
from tests.methods.tokens.staged import generated, seen
from tests.methods.video_tokens.clip_calls import VIDEO_TOKEN, clip_call, require_rule
from tests.tiny import opened

MATRIX = {"options": {"frames": 2}}


def test_clips_are_reduced_by_the_rule() -> None:
    """Of four frames of eight tokens half stays, and of six."""
    require_rule(Evs(pruning_rate=0.5), Evs(pruning_rate=0.0), (16, 24), lambda x_FPC, _: Reduced(evs(x_FPC, 0.5), x_FPC))


def test_features_of_deeper_layers_are_compared_too() -> None:
    """vLLM's Qwen3-VL compares an embedding and the features that are added later as one vector."""
    network, call = opened("qwen3_vl_moe"), clip_call(image=True, times=True)
    given: dict[str, torch.Tensor] = {}

    def see(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        given.update({key: kwargs[key] for key in ("inputs_embeds", "deepstack_visual_embeds", "visual_pos_masks")})

    with network.module.model.language_model.register_forward_pre_hook(see, with_kwargs=True):
        network.run(call)
    stage, selection = seen(network, call, Evs(pruning_rate=0.6))[0]
    assert selection is not None
    at_BN = given["visual_pos_masks"]
    whole_VD = torch.cat((given["inputs_embeds"][at_BN], *given["deepstack_visual_embeds"]), -1)
    whole_BND = whole_VD.new_zeros(*at_BN.shape, whole_VD.shape[-1])
    whole_BND[at_BN] = whole_VD
    differs = False
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        clip_N = ids_N == VIDEO_TOKEN
        frames = 4 + 2 * row
        x_FPD = whole_BND[row, clip_N].view(frames, 8, -1)
        unlike_SP = 1 - cosine_similarity(x_FPD[1:], x_FPD[:-1], dim=-1)
        count = max(8, int(frames * 8 * (1 - 0.6)))
        least = unlike_SP.flatten().sort(descending=True).values[count - 9]
        keep_FP = selection.keep_BK[row, clip_N].view(frames, 8)
        assert keep_FP[0].all()
        assert torch.equal(keep_FP[1:], unlike_SP >= least)
        differs |= not torch.equal(keep_FP, evs(stage.hidden_BKC[row, clip_N].view(frames, 8, -1), 0.6))
        assert torch.equal(selection.hidden_BKC[row, clip_N], stage.hidden_BKC[row, clip_N])  # type: ignore[index]
        assert selection.keep_BK[row, ~clip_N].all()
    assert differs  # else the test could not tell
    method = Evs(pruning_rate=0.6)
    with method.on(network, method.calibrate(network, [call])):
        made = generated(network, call)
    assert made.past_key_values.layers[0].keys.shape[2] == int(selection.keep_BK.sum(1).max()) + 4


def test_the_rate_is_that_of_a_budget_and_of_the_engine() -> None:
    assert Evs.strength(0.4) == {"pruning_rate": 0.6}
    assert Evs(pruning_rate=0.6).engine_arguments == {"video-pruning-rate": 0.6}
    assert Evs(pruning_rate=0.6, frames=4).engine_arguments == {}
    with pytest.raises(AerogelError, match=r"evs: option 'pruning_rate': expected a number from 0 to below 1, got 1\.0"):
        Evs(pruning_rate=1.0)


def test_the_share_that_is_computed_is_in_the_state() -> None:
    """Both clips have eight tokens a frame; of 80 tokens 0.7 go, but not the first frames."""
    network, call = opened("qwen2_5_vl"), clip_call()
    kept = Evs(pruning_rate=0.7).calibrate(network, [call]).kept
    assert kept == pytest.approx((max(8, int(32 * (1 - 0.7))) + max(8, int(48 * (1 - 0.7)))) / 80)
