"""TaylorSeer, PAB and FasterCache beside diffusers' own hooks, on the same inputs; first-block and MagCache are in test_residuals.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from aerogel.methods.feature_cache.fastercache import Fastercache
from aerogel.methods.feature_cache.pab import Pab
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.methods.feature_cache.taylorseer import Taylorseer
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from tests.methods.feature_cache.test_fastercache import TEN, paired
from tests.runtime.feature_cache.test_schedule import calls
from tests.tiny import opened, output

SEVENTEEN = tuple(960.0 - 60 * place for place in range(17))


def ours(network: Network, policy: FeatureCachePolicy[Any], given: Sequence[Call], **other: Any) -> tuple[list[Tensor], Sequence[str]]:
    """The answers, and what runs at each step; parts of the state may be given."""
    state = replace(policy.calibrate(network, given), **other)
    with policy.on(network, state):
        return [output(network.module, call) for call in given], state.computed


def theirs(network: Network, apply: Callable[[nn.Module, Any], None], config: Any, given: Sequence[Call]) -> list[Tensor]:
    """What diffusers' hooks answer; the network is not used afterwards."""
    step = [0.0]
    config.current_timestep_callback = lambda: step[0]
    apply(network.module, config)
    _set_cache_context(network.module, CacheContext("cond"))
    made = []
    for call in given:
        step[0] = float(call.kwargs["timestep"].flatten()[0])
        made.append(output(network.module, call))
    return made


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def in_turns(network: Network, runs: Sequence[int], steps: int) -> tuple[str, ...]:
    """A table in which all modules run at these steps."""
    return tuple(("1" if step in runs else "0") * len(cached_modules_of(network)) for step in range(steps))


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "sd3"])
@pytest.mark.parametrize(
    ("interval", "warmup", "order", "runs"),
    [(2, 3, 1, [0, 1, 2, 4, 6, 8, 10, 12, 14, 16]), (2, 1, 3, [0, 2, 4, 6, 8, 10, 12, 14, 16]), (5, 3, 1, [0, 1, 2, 4, 9, 14])],
)
def test_taylorseer(name: str, interval: int, warmup: int, order: int, runs: list[int]) -> None:
    """Ours counts the interval from the last step of the warm-up (as published), theirs from one behind the first after it.

    The two fall together at an interval of 2 only; for their own defaults (5, 3, 1) ours gets their table. By default theirs runs at steps
    0, 1, 2, 4, 9, ours (4, 2, 4) at 0, 1, 5, 9; and theirs keeps bfloat16.
    """
    given, network = calls(name, steps=SEVENTEEN), opened(name)
    policy = Taylorseer(interval=interval, order=order, warmup=warmup)
    forced = {} if interval == 2 else {"computed": in_turns(network, runs, 17)}
    found, ran = ours(network, policy, given, **forced)
    assert ran == in_turns(network, runs, 17)
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=warmup, max_order=order, taylor_factors_dtype=torch.float32,
        cache_identifiers=list(cached_modules_of(network)),
    )  # fmt: skip
    assert_same(found, theirs(opened(name), apply_taylorseer_cache, config, given))


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "unet", "cogvideox"])
@pytest.mark.parametrize(
    ("self_every", "cross_every", "first", "last", "runs"),
    [
        (2, 3, 100, 850, ("1010101011", "1001001011")),
        (2, 6, 100, 850, ("1010101011", "1000001011")),
        (2, 1, 250, 650, ("1110101111", "1" * 10)),
    ],
)
def test_pab(name: str, self_every: int, cross_every: int, first: int, last: int, runs: tuple[str, str]) -> None:
    """Theirs runs attention at multiples of the interval, counted from the first step; ours every so many steps since it ran last.

    The two fall together where the window begins one step behind a common multiple of the intervals. In the default window (100, 800) of
    these steps ours leaves out self-attention at 2, 4 and 6, theirs at 3, 5 and 7; by default theirs always runs cross-attention.
    """
    given, network = calls(name, steps=TEN), opened(name)
    found, ran = ours(network, Pab(self_every, cross_every, first, last), given)
    for place, module in enumerate(cached_modules_of(network).values()):
        wanted = {"self-attention": runs[0], "cross-attention": runs[1]}.get(module.kind, "1" * 10)
        assert "".join(row[place] for row in ran) == wanted
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=self_every, cross_attention_block_skip_range=cross_every,
        spatial_attention_timestep_skip_range=(first, last), cross_attention_timestep_skip_range=(first, last),
    )  # fmt: skip
    assert_same(found, theirs(opened(name), apply_pyramid_attention_broadcast, config, given))


def beside(name: str, policy: Fastercache, given: Sequence[Call]) -> list[int]:
    """Assert that both answer alike; return the steps at which ours left attention out."""
    found, ran = ours(opened(name), policy, given)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=policy.self_every,
        spatial_attention_timestep_skip_range=policy.window,
        unconditional_batch_skip_range=policy.unconditional_every,
        unconditional_batch_timestep_skip_range=policy.unconditional_window,
        low_frequency_weight_update_timestep_range=policy.low_window,
        high_frequency_weight_update_timestep_range=policy.high_window,
        alpha_low_frequency=policy.low,
        alpha_high_frequency=policy.high,
        attention_weight_callback=lambda _: policy.weight_first,
        tensor_format={"wan": "BCFHW", "cogvideox": "BFCHW"}.get(name, "BCHW"),
        is_guidance_distilled=policy.unconditional_every == 1,
    )
    config._unconditional_conditional_input_kwargs_identifiers = tuple(given[0].kwargs)
    exact = {} if policy.unconditional_every == 1 else {"rtol": 1e-4, "atol": 2e-5}
    assert_same(found, theirs(opened(name), apply_faster_cache, config, given), **exact)
    return [step for step, row in enumerate(ran) if "0" in row]


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "cogvideox", "sd3"])
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"self_every": 1}, []),
        ({"self_every": 1, "unconditional_every": 2, "low": 1.3, "high": 0.8, "high_window": (100.0, 900.0)}, []),
        ({"window": (-1.0, 641.0), "weight_first": 0.0, "weight_last": 0.0}, [7, 9, 11, 13]),
        ({"window": (500.0, 600.0)}, [7]),
        ({"window": (250.0, 350.0), "unconditional_every": 3}, [11]),
        ({"window": (150.0, 200.0), "self_every": 3, "weight_first": 0.9}, [13]),
    ],
)
def test_fastercache(name: str, options: dict[str, Any], left_out: list[int]) -> None:
    """Theirs keeps what it extrapolated as if that had run, ours (as the authors' code) the last two outputs that did run.

    The two fall together where the change has no weight, and where none of the two steps before one that leaves attention out does so too.
    Theirs leaves attention out only where it leaves out the unconditional half; ours also before that one's window begins: by default at
    step 5 here.
    """
    assert beside(name, Fastercache(conditional="second", **options), paired(name, SEVENTEEN)) == left_out


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "cogvideox", "sd3"])
@pytest.mark.parametrize(
    ("options", "left_out"),
    [({"window": (100.0, 700.0), "weight_first": 0.0, "weight_last": 0.0}, [5, 7, 9, 11, 13]), ({"window": (500.0, 600.0)}, [7])],
)
def test_fastercache_of_a_distilled_denoiser(name: str, options: dict[str, Any], left_out: list[int]) -> None:
    """Theirs is told that there is no guidance, ours to run the unconditional half, if there is one, at every step."""
    assert beside(name, Fastercache(unconditional_every=1, **options), calls(name, steps=SEVENTEEN)) == left_out
