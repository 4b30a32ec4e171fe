"""Segments of a video against exhaustive search and against the rules written out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from aerogel.numerics.video_segments import best_windows, clustered, contiguous, cut_where_unlike, likeness, runs, static_places


def segmentations(frames: int, longest: int) -> Iterator[list[range]]:
    """All ways to cut so many frames."""
    for count in range(frames):
        for cuts in combinations(range(1, frames), count):
            windows = [range(start, end) for start, end in pairwise([0, *cuts, frames])]
            if max(map(len, windows)) <= longest:
                yield windows


def saving(windows: list[range], static: list[list[bool]]) -> int:
    """Static places of each window, times its length less one."""
    places = len(static[0]) if static else 0
    return sum(
        (len(window) - 1) * sum(all(static[step][place] for step in window[:-1]) for place in range(places))
        for window in windows
        if len(window) > 1
    )


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 8), st.integers(0, 2**24 - 1))
def test_windows_save_as_much_as_the_best_of_all(frames: int, places: int, longest: int, bits: int) -> None:
    static = [[bool(bits >> (step * places + place) & 1) for place in range(places)] for step in range(frames - 1)]
    windows = best_windows(torch.tensor(static, dtype=torch.bool).view(frames - 1, places), longest)
    assert [frame for window in windows for frame in window] == list(range(frames))
    assert max(map(len, windows)) <= longest
    assert saving(windows, static) == max(saving(other, static) for other in segmentations(frames, longest))


def test_a_static_video_is_one_window_and_noise_has_none_of_two_frames() -> None:
    assert best_windows(torch.ones(15, 4, dtype=torch.bool), 1024) == [range(16)]
    assert best_windows(torch.zeros(15, 4, dtype=torch.bool), 1024) == [range(frame, frame + 1) for frame in range(16)]


@pytest.mark.parametrize("seed", range(4))
def test_cuts_are_at_the_least_alike_and_below_the_threshold(seed: int) -> None:
    x_FC = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
    alike = [float(cosine_similarity(one, other, 0)) for one, other in pairwise(x_FC)]
    lowest = sorted(range(11), key=lambda step: alike[step])[:3]
    expected = {step + 1 for step in range(11) if step in lowest or alike[step] < -0.2}
    found = cut_where_unlike(likeness(x_FC), 4, -0.2)
    assert {segment.start for segment in found} == {0} | expected
    assert [frame for segment in found for frame in segment] == list(range(12))


def test_a_static_video_is_cut_into_the_least_number_of_segments() -> None:
    assert len(cut_where_unlike(likeness(torch.ones(20, 4)), 8, 0.9)) == 8
    assert cut_where_unlike(likeness(torch.ones(3, 4)), 8, 0.9) == [range(1), range(1, 2), range(2, 3)]
    assert cut_where_unlike(likeness(torch.ones(1, 4)), 8, 0.9) == [range(1)]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ([0, 0, 1, 0, 0], [0, 0, 0, 0, 0]),  # both runs of 0 are its longest; the single frame goes to the left one
        ([0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]),  # the last frame is no longest run of 0
        ([0, 0, 2, 1, 1, 1], [0, 0, 1, 1, 1, 1]),  # to the longer neighbour
        ([0, 0, 2, 3, 1, 1], [0, 0, 0, 0, 1, 1]),  # of equal ones to the left
        ([3, 1, 1], [1, 1, 1]),
        ([0, 1, 2], [0, 0, 0]),  # nothing is left
        ([5], [0]),
    ],
)
def test_clusters_become_segments(given_: list[int], expected: list[int]) -> None:
    assert contiguous(given_) == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=14))
def test_segments_of_clusters_have_two_frames_at_least(labels: list[int]) -> None:
    found = runs(contiguous(labels))
    assert [frame for segment in found for frame in segment] == list(range(len(labels)))
    assert len(found) == 1 or min(map(len, found)) > 1


def test_planted_scenes_are_found() -> None:
    x_FC = torch.eye(3)[[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]] + 0.01 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert clustered(x_FC, 3, 7) == [range(4), range(4, 7), range(7, 12)]


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_static_places_have_a_high_mean_of_pairs(frames: int) -> None:
    x_FPC = torch.randn(frames, 9, 4, generator=torch.Generator().manual_seed(frames)) + 0.5
    expected = []
    for place in range(9):
        pairs = [float(cosine_similarity(x_FPC[one, place], x_FPC[other, place], 0)) for one, other in combinations(range(frames), 2)]
        expected.append(sum(pairs) / len(pairs) > 0.2)
    assert static_places(x_FPC, 0.2).tolist() == expected
    assert not static_places(x_FPC[:1], -1.0).any()
    assert static_places(x_FPC[:1].expand(frames, -1, -1), 0.999).all()
    assert not static_places(x_FPC[:1].expand(frames, -1, -1), 1.0).any()
