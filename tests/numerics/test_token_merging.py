"""Merging of tokens against literal loops: pairs, masses, windows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from aerogel.numerics.token_merging import bipartite, likeness, merged, windows


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("tokens", [8, 9])
def test_pairs_are_the_most_alike(tokens: int, class_token: bool) -> None:
    key_ISD = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    for count in (0, 1, 3, 99):
        pairs = bipartite(key_ISD, count, class_token)
        for image in range(2):
            found = []
            for one in range(2 if class_token else 0, tokens, 2):
                alike = {
                    other: float(cosine_similarity(key_ISD[image, one], key_ISD[image, other], dim=0)) for other in range(1, tokens, 2)
                }
                other = max(alike, key=alike.__getitem__)
                found.append((alike[other], one, other))
            expected = sorted(found, reverse=True)[: min(count, (tokens - class_token) // 2)]
            assert [(one, other) for _, one, other in expected] == list(
                zip(pairs.source_IM[image].tolist(), pairs.target_IM[image].tolist(), strict=True)
            )


def test_masses_and_means_are_kept() -> None:
    random = torch.Generator().manual_seed(0)
    x_ISC, size_IS = torch.randn(2, 9, 4, generator=random), torch.randint(1, 5, (2, 9), generator=random).float()
    pairs = bipartite(torch.randn(2, 9, 6, generator=random), 3, True)
    y_ISC, sum_IS, stays_IS = merged(x_ISC, size_IS, pairs)
    for image in range(2):
        stays_S = stays_IS[image]
        assert int(stays_S.sum()) == 6
        assert stays_S[0]
        assert torch.equal(y_ISC[image, 0], x_ISC[image, 0]) or 0 in pairs.target_IM[image]
        assert sum_IS[image][stays_S].sum() == size_IS[image].sum()
        before, after = (size_IS[image] @ x_ISC[image]), sum_IS[image][stays_S] @ y_ISC[image][stays_S]
        torch.testing.assert_close(after, before)
        for target in set(pairs.target_IM[image].tolist()):
            members = [target, *pairs.source_IM[image][pairs.target_IM[image] == target].tolist()]
            mean = sum(size_IS[image, one] * x_ISC[image, one] for one in members) / sum(size_IS[image, one] for one in members)
            torch.testing.assert_close(y_ISC[image, target], mean)


def test_windows_and_their_likeness() -> None:
    place_GW = windows(6, 3)
    assert place_GW.tolist()[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert sorted(place_GW.flatten().tolist()) == list(range(36))
    x_PC = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    for window, alike in zip(place_GW.tolist(), likeness(x_PC, place_GW).tolist(), strict=True):
        pairs = [float(cosine_similarity(x_PC[one], x_PC[other], dim=0)) for one in window for other in window if one != other]
        assert alike == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
