"""The states of feature-cache policies: what is saved of them, what is read back, and what a damaged one says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.feature_cache.delta_dit import DeltaDit
from aerogel.methods.feature_cache.fora import Fora
from aerogel.methods.feature_cache.harmonica import Harmonica
from aerogel.methods.feature_cache.l2c import L2c
from aerogel.methods.feature_cache.magcache import Magcache
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.methods.feature_cache.smoothcache import Smoothcache
from aerogel.methods.feature_cache.teacache import Teacache
from aerogel.methods.feature_cache.toca import Toca
from aerogel.runtime.feature_cache.streams import FeatureCacheState
from aerogel.runtime.policy_state import PolicyState
from tests.methods.feature_cache import test_harmonica, test_l2c
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

BOTH = {"steps", "sampler"}
SCHEDULE = BOTH | {"modules", "computed"}
BLOCKS = BOTH | {"blocks"}
COSTS = {"macs", "macs_saved", "cache_bytes"}
ROUTER = SCHEDULE | COSTS | {"scores", "guidance", "error", "error_without_reuse", "log"}
KEYS: list[tuple[FeatureCachePolicy[Any], set[str]]] = [
    (Fora(), SCHEDULE | COSTS),
    (Toca(), SCHEDULE | {"shares", "scored_by"}),
    (Smoothcache(), SCHEDULE | COSTS | {"self-attention.change", "feed-forward.change"}),
    (DeltaDit(), BLOCKS),
    (Magcache(), BLOCKS | {"ratios", "left_out"}),
    (Teacache(degree=2), BLOCKS | {"coefficients"}),
    (Harmonica(**test_harmonica.SHORT), ROUTER | {"lambda", "penalty"}),
    (Harmonica(**test_harmonica.SHORT, search=4, samples=2), ROUTER | {"lambda", "penalty", "decoded"}),
    (L2c(**test_l2c.SHORT), ROUTER | {"images"}),
]


def test_every_runtime_policy_declares_its_state() -> None:
    found = [catalog.find("methods", name) for name in catalog.names("methods")]
    runtime = [cls for cls in found if issubclass(cls, RuntimePolicy)]
    assert len(runtime) > 15
    assert all(issubclass(cls.state, PolicyState) for cls in runtime)
    assert all(issubclass(cls.state, FeatureCacheState) == issubclass(cls, FeatureCachePolicy) for cls in runtime)


@pytest.mark.parametrize(("policy", "keys"), KEYS, ids=lambda one: type(one).__name__)
def test_a_state_is_read_back_from_its_keys(policy: FeatureCachePolicy[Any], keys: set[str]) -> None:
    network = dit_pipeline()
    calls = recorded(network)
    state = policy.calibrated(network, calls)
    saved = state.as_dict()
    assert saved.keys() == keys
    tensors = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    rest = json.loads(json.dumps({key: value for key, value in saved.items() if key not in tensors}))
    read = policy.read({**rest, **tensors})
    assert type(read) is type(state) is policy.state
    again = read.as_dict()
    assert again.keys() == keys
    assert all(torch.equal(again[key], value) if isinstance(value, Tensor) else again[key] == value for key, value in saved.items())
    with policy.on(network, read):
        network.run(calls[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": None}, "fora: its saved state has no field 'modules'; calibrate the policy anew"),
        ({"blocks": 2}, "fora: its saved state has an unknown field 'blocks'"),
        ({"computed": ["11", 0]}, r"fora: field computed\[1\] of its saved state"),
        ({"computed": ["11", "0"]}, "a schedule of 2 steps and 2 modules has another table"),
        ({"computed": ["11"]}, "a schedule of 2 steps and 2 modules has another table"),
        ({"steps": "10"}, "fora: field steps of its saved state"),
    ],
)
def test_a_damaged_state_is_refused_by_policy_and_field(change: dict[str, Any], message: str) -> None:
    saved = {"steps": [1.0, 0.0], "sampler": "", "modules": ["a", "b"], "computed": ["11", "00"]} | change
    with pytest.raises(AerogelError, match=message):
        Fora.read({key: value for key, value in saved.items() if value is not None})
