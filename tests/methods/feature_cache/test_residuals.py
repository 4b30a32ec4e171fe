"""Policies that leave out blocks: first-block, MagCache, TeaCache, Delta-DiT; beside diffusers' own hooks where it has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.delta_dit import DeltaDit
from aerogel.methods.feature_cache.first_block import FirstBlock
from aerogel.methods.feature_cache.magcache import Magcache, left_out
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.methods.feature_cache.smoothcache import Smoothcache
from aerogel.methods.feature_cache.teacache import Teacache
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.block_cache import residuals
from tests.runtime.feature_cache.test_block_cache import DEPTH, deep, ran
from tests.runtime.feature_cache.test_replay import apart, dit_pipeline, recorded
from tests.runtime.feature_cache.test_schedule import calls
from tests.tiny import output

TEN = tuple(99.0 - place for place in range(10))
"""Steps so close that random weights take little notice."""


def drifting(name: str, seed: int = 0, steps: Sequence[float] = TEN) -> list[Call]:
    """A generation whose inputs change as little from step to step as those of a denoiser do."""
    ends = [calls(name, seed, (0.0, 0.0))[place].kwargs for place in range(2)]
    made = []
    for place, step in enumerate(steps):
        share = 0.01 * place**1.5
        mixed = {
            key: torch.lerp(one, ends[1][key], share) if one.is_floating_point() and one.shape == ends[1][key].shape else one
            for key, one in ends[0].items()
        }
        made.append(Call((), mixed | {"timestep": torch.full_like(ends[0]["timestep"], int(step))}))
    return made


@contextmanager
def theirs(network: Network, config: Any) -> Iterator[None]:
    """diffusers' hooks on a copy of the network."""
    network.module.enable_cache(config)
    with network.module.cache_context("cond"):
        yield


def under(network: Network, policy: FeatureCachePolicy[Any], given: Sequence[Call]) -> tuple[list[Tensor], list[int | None], Any]:
    """The answers of a generation, what was left out at each step, and the state."""
    state = policy.calibrate(network, given)
    with policy.on(network, state) as spans:
        made = [output(network.module, call) for call in given]
    return made, [out for _, out in spans.decisions], state


@pytest.mark.parametrize("threshold", [0.14, 0.2, 0.3])
def test_first_block_answers_like_diffusers(threshold: float) -> None:
    network, given = deep("wan"), drifting("wan")
    made, decisions, _ = under(network, FirstBlock(threshold), given)
    other = Network(copy.deepcopy(network.module), network.family)
    with theirs(other, FirstBlockCacheConfig(threshold=threshold)):
        wanted = [output(other.module, call) for call in given]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert 0 in decisions
    assert decisions.count(None) > 1


def test_first_block_keeps_blocks_and_steps_that_always_run() -> None:
    network, given = deep("dit"), drifting("dit")
    found = ran(network)
    made, decisions, _ = under(network, FirstBlock(9.0, first=2, last=1, warmup=3), given)
    assert decisions == [None] * 3 + [0] * 7
    assert set(found[-8:]) == {0, 1, 4}
    with pytest.raises(AerogelError, match="first 4 and last 1 leave nothing of 5 blocks"):
        FirstBlock(first=4, last=1).calibrate(network, given)
    with pytest.raises(AerogelError, match="option 'threshold': expected a number of at least 0, got -1"):
        FirstBlock(-1).calibrate(network, given)
    assert all(answer.isfinite().all() for answer in made)


@pytest.mark.parametrize(("threshold", "retention"), [(0.06, 0.2), (0.3, 0.1), (0.05, 0.5)])
def test_magcache_answers_like_diffusers(threshold: float, retention: float) -> None:
    network, given = deep("wan"), drifting("wan")
    made, decisions, state = under(network, Magcache(threshold, retention=retention), given)
    other = Network(copy.deepcopy(network.module), network.family)
    config = MagCacheConfig(threshold, 3, retention, num_inference_steps=len(TEN), mag_ratios=state.ratios)
    with theirs(other, config):
        wanted = [output(other.module, call) for call in given]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert decisions[0] is None
    assert 0 in decisions


def test_magcache_measures_ratios_of_token_norms() -> None:
    network, given = deep("dit"), [*drifting("dit"), *drifting("dit", 4)]
    ratio_T = Magcache().calibrate(network, given).ratios
    norms = [change.norm(dim=-1) for change in residuals(network, Trajectories.of(network, given))]
    literal = [(norms[3] / norms[2]).mean(), (norms[13] / norms[12]).mean()]
    assert float(ratio_T[3]) == pytest.approx(float(sum(literal)) / 2, rel=1e-5)
    assert float(ratio_T[0]) == 1


@pytest.mark.parametrize("policy", [Magcache(), Teacache(), Smoothcache()])
def test_branches_in_calls_of_their_own_are_measured_as_in_one_batch(policy: FeatureCachePolicy[Any]) -> None:
    network = dit_pipeline()
    together = recorded(network, steps=8)
    ours, wanted = (policy.calibrate(network, given).as_dict() for given in (apart(together), together))
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
        else:
            assert ours[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


def test_magcache_counts_from_the_last_step_that_ran() -> None:
    ratio_T = torch.tensor([1.0, 1.1, 1.02, 1.02, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert left_out(ratio_T, Magcache(0.07, longest=3)) == "0011011101"
    assert left_out(torch.ones(8), Magcache(0.0, longest=2, retention=0.25)) == "00110110"
    assert left_out(torch.full((6,), 2.0), Magcache(0.1)) == "000000"
    with pytest.raises(AerogelError, match="option 'longest': expected a number from 1 to 1,000,000, got 0"):
        Magcache(longest=0).calibrate(deep("dit"), drifting("dit"))


def test_teacache_is_its_published_loop() -> None:
    """The loop that its authors give, written out over recorded inputs of the first attention and answers of the network."""
    network, given = deep("dit"), drifting("dit")
    policy = Teacache(threshold=0.3, degree=1)
    made, decisions, state = under(network, policy, given)
    inputs: list[Tensor] = []
    hook = next(iter(network.blocks().values())).attn1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr]
    answers = [output(network.module, call) for call in given]
    hook.remove()

    def apart(tensors: Sequence[Tensor]) -> list[float]:
        pairs = zip(tensors[1:], tensors, strict=False)
        return [float((now - before).abs().mean() / before.abs().mean()) for now, before in pairs]

    rescale = numpy.poly1d(numpy.polyfit(apart(inputs), apart(answers), 1))
    total, wanted = 0.0, [None]
    for step, distance in enumerate(apart(inputs), 1):
        total += float(rescale(distance))
        skips = total < policy.threshold and step < len(given) - 1
        wanted.append(0 if skips else None)  # type: ignore[arg-type]
        total = total if skips else 0.0
    assert decisions == wanted
    assert 0 in wanted
    assert wanted.count(None) > 2
    assert state.coefficients == pytest.approx(list(rescale.coefficients[::-1]), rel=1e-4)
    last = [place for place, out in enumerate(decisions) if out is None]
    assert all(torch.equal(made[place], answers[place]) for place in last)


def test_teacache_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(AerogelError, match="degree 9 is not below the 9 recorded pairs"):
        Teacache(degree=9).calibrate(deep("dit"), drifting("dit"))


def test_delta_dit_leaves_out_the_rear_first() -> None:
    network, given = deep("dit"), drifting("dit")
    found = ran(network)
    _, decisions, _ = under(network, DeltaDit(interval=2, share=0.6, boundary=0.5), given)
    assert decisions == [None, 0, None, 0, None, 1, None, 1, None, 1]
    assert set(found[7:9]) == {0, 1}, "the first two of five blocks"
    assert set(found[-2:]) == {3, 4}
    whole, _, _ = under(network, DeltaDit(interval=2, share=1.0), given)
    every, _, _ = under(network, Magcache(9.0, longest=1, retention=0.0), given)
    assert all(torch.equal(a, b) for a, b in zip(whole, every, strict=True)), "all blocks, every second step"
    with pytest.raises(AerogelError, match="option 'share': expected a number above 0 and at most 1, got 0"):
        DeltaDit(share=0).calibrate(network, given)


@pytest.mark.parametrize("policy", [FirstBlock(), Magcache(), Teacache(), DeltaDit()], ids=lambda policy: type(policy).__name__)
def test_other_networks_are_refused(policy: FeatureCachePolicy[Any]) -> None:
    state = policy.calibrate(deep("dit"), drifting("dit"))
    with (
        pytest.raises(AerogelError, match=f"made for {DEPTH + 1} blocks, this denoiser has {DEPTH}"),
        policy.on(deep("dit"), replace(state, blocks=DEPTH + 1)),
    ):
        pass
