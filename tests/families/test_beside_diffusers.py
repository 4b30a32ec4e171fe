"""Blocks that pass on text and image: where they are left out, the denoiser answers as with diffusers' own hooks, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig

from aerogel.methods.feature_cache.first_block import FirstBlock
from aerogel.methods.feature_cache.magcache import Magcache, MagcacheState
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.model.network import Network
from tests.methods.feature_cache.test_residuals import TEN, drifting, theirs, under
from tests.runtime.feature_cache.test_block_cache import deep
from tests.tiny import output

# diffusers has no cache for the class of SD3, and its hooks fail on a last block that drops the text.


def check(name: str, policy: FeatureCachePolicy[Any], config_of: Callable[[Any], Any]) -> None:
    network, given = deep(name), drifting(name)
    made, decisions, state = under(network, policy, given)
    other = Network(copy.deepcopy(network.module), network.family)
    with theirs(other, config_of(state)):
        wanted = [output(other.module, call) for call in given]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert 0 in decisions
    assert decisions.count(None) > 1


@pytest.mark.parametrize(("name", "threshold"), [("flux", 1.0), ("cogvideox", 0.3), ("cogvideox", 0.7)])
def test_first_block(name: str, threshold: float) -> None:
    check(name, FirstBlock(threshold), lambda _: FirstBlockCacheConfig(threshold=threshold))


@pytest.mark.parametrize(("name", "threshold"), [("flux", 0.3), ("cogvideox", 0.06), ("cogvideox", 0.3)])
def test_magcache(name: str, threshold: float) -> None:
    def config(state: MagcacheState) -> MagCacheConfig:
        return MagCacheConfig(threshold, 3, 0.1, num_inference_steps=len(TEN), mag_ratios=state.ratios)

    check(name, Magcache(threshold, retention=0.1), config)
