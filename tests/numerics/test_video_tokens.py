"""Rules for tokens of a video against loops that say the same, on static videos, on noise and at full budgets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from aerogel.numerics.token_selection import density_peaks
from aerogel.numerics.video_segments import best_windows, clustered, likeness, static_places
from aerogel.numerics.video_tokens import Fastvid, Holitom, Reduced, dycoke, evs, fastvid, fold, holitom, part, prunevid


def noise(frames: int, places: int, channels: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(frames, places, channels, generator=torch.Generator().manual_seed(seed))


def still(frames: int, places: int) -> Tensor:
    return noise(1, places).expand(frames, -1, -1)


def kept(reduced: Reduced) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in reduced.keep_FP]


@given(st.integers(0, 400), st.integers(0, 400))
def test_a_part_is_rounded_down_without_errors_of_floating_point(hundredths: int, whole: int) -> None:
    assert part(hundredths / 100, whole) == hundredths * whole // 100


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 8, 11])
def test_dycoke_keeps_what_is_least_like_its_like(frames: int) -> None:
    x_FPC = noise(frames, 10)
    found = dycoke(x_FPC, 0.3)
    for frame, row in enumerate(kept(found)):
        before = {1: frame - 1, 2: frame - 2, 3: frame - 1}.get(frame % 4)
        if before is None:
            assert row == list(range(10))
        else:
            order = sorted(range(10), key=lambda place: float(cosine_similarity(x_FPC[frame, place], x_FPC[before, place], 0)))
            assert row == sorted(order[:3])
    assert found.x_FPC is x_FPC


def test_dycoke_computes_475_of_1000_tokens() -> None:
    assert int(dycoke(still(16, 10), 0.3).keep_FP.sum()) == 0.475 * 160
    assert dycoke(noise(16, 10), 1.0).keep_FP.all()


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_evs_keeps_what_vllm_keeps(frames: int, places: int, hundredths: int, is_still: bool, dtype: torch.dtype) -> None:
    """Its rule in plain loops: the first frame is unlike everything, equal tokens go from the end, and the count is rounded as there."""
    x_FPC = (still(frames, places) if is_still else noise(frames, places, 4, hundredths)).to(dtype)
    pruning_rate = hundredths / 100
    count = max(places, int(places * frames * (1 - pruning_rate)))
    unlike: list[float] = []
    for frame in range(frames):
        for place in range(places):
            alike = cosine_similarity(x_FPC[frame, place], x_FPC[max(frame - 1, 0), place], dim=0)
            unlike.append(float(1 - alike) if frame else 255.0)
    order = sorted(range(len(unlike)), key=lambda number: (-unlike[number], number))
    keep_FP = evs(x_FPC, pruning_rate)
    assert keep_FP.flatten().nonzero()[:, 0].tolist() == sorted(order[:count])
    assert keep_FP[0].all()
    assert int(keep_FP.sum()) == count


def test_evs_rounds_as_vllm_does() -> None:
    """A rate of 0.9 leaves of 50 tokens the 4 below 50 x (1 - 0.9) in floating point, but the first frame has 5."""
    assert int(50 * (1 - 0.9)) == 4
    assert int(evs(noise(10, 5), 0.9).sum()) == 5
    assert int(evs(noise(25, 2), 0.9).sum()) == 4
    assert int(evs(noise(4, 5), 0.99).sum()) == 5
    assert evs(noise(4, 5), 0.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_prunevid_follows_its_rule(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scene_FPC = (noise(2, 40, seed=seed) + 4 * torch.eye(2, 32)[:, None])[[0, 0, 0, 0, 1, 1, 1, 1]]
    moving_P = torch.rand(40, generator=random) < 0.5
    x_FPC = torch.where(moving_P[None, :, None], noise(8, 40, seed=seed + 9), scene_FPC)
    found = prunevid(x_FPC, 0.25, 0.8, 0.5)
    assert clustered(x_FPC.mean(1), 2, 7) == [range(4), range(4, 8)]
    for start in (0, 4):
        static_P = static_places(x_FPC[start : start + 4], 0.8)
        assert torch.equal(static_P, ~moving_P)
        for frame in range(start, start + 4):
            expected = torch.zeros(40, dtype=torch.bool)
            for chosen_P in (static_P, ~static_P) if frame == start else (~static_P,):
                number, count = chosen_P.nonzero()[:, 0], int(chosen_P.sum())
                value = {int(place): x_FPC[frame, place] for place in number}
                if frame == start and chosen_P is static_P:
                    value = {place: x_FPC[start : start + 4, place].mean(0) for place in value}
                if count > 14:
                    tokens_NC = torch.stack(list(value.values()))
                    groups = density_peaks(tokens_NC, count // 2, 7)
                    centres = number[groups.centre_G].tolist()
                    value = {place: tokens_NC[groups.group_N == group].mean(0) for group, place in enumerate(centres)}
                for place, feature_C in value.items():
                    expected[place] = True
                    torch.testing.assert_close(found.x_FPC[frame, place], feature_C)
            assert torch.equal(found.keep_FP[frame], expected)


def test_prunevid_of_a_static_video_is_half_a_frame_a_segment_and_of_noise_half_of_each() -> None:
    assert int(prunevid(still(8, 20), 0.25, 0.8, 0.5).keep_FP.sum()) == 10
    assert prunevid(noise(8, 20), 0.25, 0.8, 0.5).keep_FP.sum(1).tolist() == [10] * 8
    assert prunevid(noise(8, 20), 0.25, 1.0, 1.0).keep_FP.all()
    assert prunevid(still(8, 20), 0.25, 1.0, 1.0).keep_FP.all()
    assert prunevid(noise(1, 20), 0.25, 0.8, 0.5).keep_FP.sum() == 10
    assert prunevid(noise(2, 14), 0.25, 0.8, 0.5).keep_FP.all()


@pytest.mark.parametrize("clustered_", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_holitom_keeps_a_share_of_each_frame_once_static_tokens_are_merged(seed: int, clustered_: float) -> None:
    x_FPC = torch.where((torch.arange(20) < 8)[None, :, None], still(6, 20), noise(6, 20, seed=seed))
    attention_FP = torch.rand(6, 20, generator=torch.Generator().manual_seed(seed))
    found = holitom(x_FPC, attention_FP, Holitom(keep=0.3, clustered=clustered_))
    assert best_windows(likeness(x_FPC) > 0.65, 99) == [range(6)]
    share = 0.3 / (1 - 8 * 5 / 120)
    whole = math.ceil(12 * share)
    strongest = round(whole * (1 - clustered_))
    for frame, row in enumerate(kept(found)):
        moving = [place for place in row if place >= 8]
        order = sorted(range(8, 20), key=lambda place: -attention_FP[frame, place])
        assert len(moving) == whole
        assert set(order[:strongest]) <= set(moving)
        assert all(torch.equal(found.x_FPC[frame, place], x_FPC[frame, place]) for place in order[:strongest])
        assert len(row) - whole == (round(8 * share) if frame == 0 else 0)


def test_a_cluster_of_holitom_is_mostly_its_centre() -> None:
    x_FPC = still(2, 12)
    found = holitom(x_FPC, None, Holitom(keep=0.25))  # one window of 24 tokens, six of which stay
    assert [len(row) for row in kept(found)] == [6, 0]
    groups = density_peaks(x_FPC[0], 6, 6)
    for group, place in enumerate(groups.centre_G.tolist()):
        others = [other for other in (groups.group_N == group).nonzero()[:, 0].tolist() if other != place]
        expected_C = 0.6 * x_FPC[0, place] + 0.4 * x_FPC[0, others].mean(0) if others else x_FPC[0, place]
        torch.testing.assert_close(found.x_FPC[0, place], expected_C)


def test_holitom_of_a_static_video_is_one_frame_and_of_noise_a_share_of_each() -> None:
    assert [len(row) for row in kept(holitom(still(8, 20), None, Holitom(keep=0.125)))] == [20, *[0] * 7]
    assert [len(row) for row in kept(holitom(noise(8, 20), torch.rand(8, 20), Holitom(keep=0.2)))] == [4] * 8
    assert holitom(still(8, 20), None, Holitom(keep=1.0)).keep_FP.all()
    assert holitom(noise(1, 20), None, Holitom(keep=0.2)).keep_FP.sum() == 4


def fastvid_written_out(
    x_FPC: Tensor, segments: list[range], attention_FP: Tensor, stays: int, contextual: int
) -> dict[tuple[int, int], Tensor]:
    """Kept tokens with their features, by frame and place."""
    frames, places, _ = x_FPC.shape
    salient = {
        (frame, place)
        for frame in range(frames)
        for place in sorted(range(places), key=lambda place: -attention_FP[frame, place])[: stays - contextual]
    }
    value = {(frame, place): x_FPC[frame, place] for frame, place in salient}
    for segment in segments:
        free = [(frame, place) for frame in segment for place in range(places) if (frame, place) not in salient]
        anchored = [frame for frame in segment if (segment[-1] - frame) % 4 == 0]
        for frame in anchored:
            number = torch.tensor([place for other, place in free if other == frame])
            centres = number[density_peaks(x_FPC[frame, number], contextual * len(segment) // len(anchored), 4).centre_G].tolist()
            members: dict[int, list[Tensor]] = {place: [] for place in centres}
            for one, other in free:
                members[max(centres, key=lambda place: float(cosine_similarity(x_FPC[frame, place], x_FPC[one, other], 0)))].append(
                    x_FPC[one, other]
                )
            for place, those in members.items():
                weight = max(1 / (len(those) + 1), 0.6)
                value[frame, place] = weight * x_FPC[frame, place] + (1 - weight) * torch.stack(those).mean(0)
    return value


@pytest.mark.parametrize("least", [1, 3, 8])
def test_fastvid_follows_its_rule(least: int) -> None:
    x_FPC, attention_FP = noise(9, 30), torch.rand(9, 30, generator=torch.Generator().manual_seed(1))
    vector_FC = torch.ones(9, 4) + 0.01 * noise(1, 9, 4)[0]
    alike = likeness(vector_FC)
    starts = sorted([0, *(step + 1 for step in sorted(range(8), key=lambda step: float(alike[step]))[: least - 1])])
    segments = [range(start, stop) for start, stop in zip(starts, [*starts[1:], 9], strict=True)]
    found = fastvid(x_FPC, vector_FC, attention_FP, Fastvid(keep=0.2, segments=least))
    value = fastvid_written_out(x_FPC, segments, attention_FP, 6, 2)
    assert {(frame, place) for frame, row in enumerate(kept(found)) for place in row} == value.keys()
    for (frame, place), feature_C in value.items():
        torch.testing.assert_close(found.x_FPC[frame, place], feature_C)


def test_fastvid_of_a_static_video_has_as_many_segments_as_it_must() -> None:
    """Twelve frames in segments of one frame but the last: each salient token stays, anchors are in the last frame of each segment."""
    found = fastvid(still(12, 20), torch.ones(12, 4), torch.rand(12, 20), Fastvid(keep=0.5))
    assert int(found.keep_FP.sum()) == 12 * 6 + 7 * 4 + 2 * (5 * 4 // 2)
    assert fastvid(noise(4, 20), torch.ones(4, 4), torch.rand(4, 20), Fastvid(keep=1.0)).keep_FP.all()


def test_planted_salience_stays() -> None:
    attention_FP = torch.zeros(4, 20)
    attention_FP[:, [3, 7]] = 1.0
    for found in (
        holitom(noise(4, 20), attention_FP, Holitom(keep=0.2)),
        fastvid(noise(4, 20), noise(4, 1)[:, 0], attention_FP, Fastvid(keep=0.2)),
    ):
        assert found.keep_FP[:, [3, 7]].all()


@pytest.mark.parametrize(
    "rule",
    [
        lambda x_FPC: dycoke(x_FPC, 0.3),
        lambda x_FPC: prunevid(x_FPC, 0.25, 0.8, 0.5),
        lambda x_FPC: holitom(x_FPC, x_FPC[..., 0], Holitom(keep=0.3, clustered=0.5)),
        lambda x_FPC: fastvid(x_FPC, x_FPC.mean(1), x_FPC[..., 0], Fastvid(keep=0.3)),
    ],
)
def test_rules_leave_their_input_alone_and_are_deterministic(rule: Callable[[Tensor], Reduced]) -> None:
    x_FPC = torch.where((torch.arange(30) < 15)[None, :, None], still(8, 30), noise(8, 30))
    before_FPC = x_FPC.clone()
    first, second = rule(x_FPC), rule(x_FPC)
    assert torch.equal(x_FPC, before_FPC)
    assert torch.equal(first.keep_FP, second.keep_FP)
    assert torch.equal(first.x_FPC[first.keep_FP], second.x_FPC[first.keep_FP])


@pytest.mark.parametrize("seed", range(3))
def test_folding_takes_means_and_no_order_matters(seed: int) -> None:
    x_NC = noise(1, 12, 6, seed)[0]
    keep_N = torch.arange(12) % 3 == 0
    folded_NC = fold(x_NC, keep_N)
    members: dict[int, list[int]] = {place: [place] for place in (0, 3, 6, 9)}
    for token in (token for token in range(12) if token % 3):
        members[max(members, key=lambda place: float(cosine_similarity(x_NC[token], x_NC[place], 0)))].append(token)
    for place, those in members.items():
        torch.testing.assert_close(folded_NC[place], x_NC[those].mean(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fold(x_NC[order], keep_N[order])[keep_N[order]], folded_NC[order][keep_N[order]])


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 9))
def test_clips_of_all_sizes_give_finite_tokens(frames: int, places: int, share: float, is_still: bool, seed: int) -> None:
    x_FPC = noise(1, places, 4, seed).expand(frames, -1, -1) if is_still else noise(frames, places, 4, seed)
    attention_FP = noise(frames, places, 1, seed + 1)[..., 0]
    for found in (
        dycoke(x_FPC, share),
        prunevid(x_FPC, 0.25, 0.8, share, least=0),
        holitom(x_FPC, attention_FP, Holitom(keep=share, clustered=share)),
        fastvid(x_FPC, x_FPC.mean(1), attention_FP, Fastvid(keep=share, contextual=share)),
    ):
        assert found.keep_FP.shape == (frames, places)
        assert found.x_FPC[found.keep_FP].isfinite().all()
    assert int(dycoke(x_FPC, share).keep_FP.sum()) == sum(places if frame % 4 == 0 else part(share, places) for frame in range(frames))
    stays = part(share, places)
    assert int(fastvid(x_FPC, x_FPC.mean(1), attention_FP, Fastvid(keep=share)).keep_FP.sum()) <= frames * stays
