"""Cache entries in float8: they hold as many bytes as the formula says and give what they hold; what is kept must not be written into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.policy import BlockCachePolicy, FeatureCachePolicy, SchedulePolicy
from aerogel.model.calls import tensors_in
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.block_cache import TableRule, caching_blocks
from aerogel.runtime.feature_cache.cache_dtype import Float8, cache_format
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, costs_of
from aerogel.runtime.feature_cache.schedule import CacheEntry, Schedule, cache_bytes, caching, entry_sizes
from aerogel.runtime.feature_cache.taylor import TaylorSeries
from tests.runtime.feature_cache.test_block_cache import AT, DEPTH, deep
from tests.runtime.feature_cache.test_schedule import STEPS, calls, table
from tests.tiny import opened, output

FLOAT8 = cache_format("float8")
POLICIES = [
    policy
    for policy in (catalog.find("methods", name) for name in catalog.names("methods"))
    if isinstance(policy, type) and issubclass(policy, FeatureCachePolicy)
]


def half(network: Network) -> Schedule:
    """The second step and the third reuse everything."""
    computed_TN = torch.ones(len(STEPS), len(cached_modules_of(network)), dtype=torch.bool)
    computed_TN[1:3] = False
    return table(network, computed_TN)


@contextmanager
def given(network: Network) -> Iterator[list[list[Tensor]]]:
    """What modules give, one after the other."""
    seen: list[list[Tensor]] = []
    hooks = [
        network.module.get_submodule(name).register_forward_hook(lambda *about: seen.append([one.clone() for one in tensors_in(about[2])]))
        for name in cached_modules_of(network)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def within(x: Tensor, rounded: Tensor) -> bool:
    """Whether float8 explains the difference: three bits behind the first, and no step below the smallest of a token's scale."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    bound = torch.maximum(x.float().abs() * 2**-4, scale * 2**-10)
    return bool(((x.float() - rounded.float()).abs() <= bound * (1 + 1e-5) + torch.finfo(x.dtype).eps * x.float().abs()).all())


def formula(outputs: Sequence[Tensor]) -> int:
    """A byte for each number, and four for each token."""
    return sum(x.numel() + 4 * x.numel() // x.shape[-1] for x in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_again_is_within_a_sixteenth(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 50, 64) * torch.logspace(-3, 2, 50)[:, None]).to(dtype)
    x[0, 0] = 0
    nest = (x, {"more": x[0], "count": torch.tensor([3, 4]), "nothing": x[:, :0]}, "name", None)
    stored = FLOAT8.pack(nest)
    assert isinstance(stored[0], Float8)
    assert stored[0].codes.dtype == torch.float8_e4m3fn
    read = FLOAT8.unpack(stored)
    assert read[0].dtype == dtype
    assert within(x, read[0])
    assert within(x[0], read[1]["more"])
    assert not torch.equal(x, read[0])
    assert torch.equal(read[1]["count"], nest[1]["count"])  # type: ignore[index]
    assert read[1]["nothing"].shape == (3, 0, 64)
    assert read[2:] == ("name", None)
    assert sum(tensor.nbytes for tensor in stored[0][:2]) == formula([x])


def test_what_is_kept_has_no_past() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    assert not FLOAT8.unpack(FLOAT8.pack(x * 2)).requires_grad


@pytest.mark.parametrize("name", ["dit", "unet", "sd3", "flux"])
def test_slots_hold_what_the_formula_says(name: str) -> None:
    network = opened(name)
    schedule, call = half(network), calls(name)[0]
    with given(network) as seen:
        output(network.module, call)
    with caching(network, schedule, store="float8") as reuse:
        for each in calls(name):
            output(network.module, each)
    held = sum(formula(outputs) for outputs in seen)
    sizes = entry_sizes(network, call, "float8")
    assert reuse.peak_bytes == held == sum(sizes) == cache_bytes(schedule, sizes)
    assert entry_sizes(network, call) == costs_of(network, call).module_bytes
    assert not any("forward" in module.__dict__ for module in network.module.modules())


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_units_give_what_they_gave_but_for_the_rounding(name: str) -> None:
    network = opened(name)
    steps = []
    with caching(network, half(network), store="float8"), given(network) as seen:
        for call in calls(name)[:3]:
            seen.clear()
            output(network.module, call)
            steps.append(list(seen))
    for computed, first, second in zip(*steps, strict=True):
        assert len(computed) == len(first)
        for x, rounded, again in zip(computed, first, second, strict=True):
            assert within(x, rounded)
            assert not torch.equal(x, rounded)
            assert torch.equal(rounded, again), "it is rounded once"


def test_slots_that_reckon_with_changes_are_refused() -> None:
    network = opened("dit")
    with (
        pytest.raises(AerogelError, match="cache entries in float8 hold outputs to 4 bits"),
        caching(network, half(network), partial(TaylorSeries, order=1), "float8"),
    ):
        pass
    with (
        pytest.raises(AerogelError, match="cache_dtype is 'float4', expected one of compute, float8"),
        caching(
            network,
            half(network),
            CacheEntry,
            "float4",  # type: ignore[arg-type]
        ),
    ):
        pass


def test_stretches_keep_their_change_in_float8() -> None:
    network = deep("dit")
    rule = partial(TableRule, ((0, DEPTH),), [None, 0, 0, None])
    blocks = list(network.blocks().values())
    ends: list[Tensor] = []
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: ends.append(args[0].clone())),
        blocks[-1].register_forward_hook(lambda *about: ends.append(about[2].clone())),
    ]
    with caching_blocks(network, AT, rule, "float8") as spans:
        for call in calls("dit")[:2]:
            output(network.module, call)
    for hook in hooks:
        hook.remove()
    change, again = ends[1] - ends[0], ends[3] - ends[2]
    torch.testing.assert_close(again, FLOAT8.unpack(FLOAT8.pack(change)), rtol=0, atol=1e-5)  # the stream's own rounding
    assert not torch.allclose(again, change, rtol=1e-3)
    assert spans.peak_bytes == formula([change])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_a_policy_keeps_float8_or_says_that_it_does_not(policy: type[FeatureCachePolicy[Any]]) -> None:
    name = catalog.card("methods", next(name for name in catalog.names("methods") if catalog.find("methods", name) is policy)).name
    steps = {"name": "kept", "steps": [{name: {"cache_dtype": "float8"}}]}
    if policy.on in (SchedulePolicy.on, BlockCachePolicy.on) or policy.rounds:
        method = Recipe.parse(steps).steps[0].method
        assert isinstance(method, policy)
        assert method.cache_dtype == "float8"
    else:
        with pytest.raises(AerogelError, match="set cache_dtype to compute"):
            Recipe.parse(steps)
    assert policy().cache_dtype == "compute"
    with pytest.raises(AerogelError, match="'float4'"):
        policy(cache_dtype="float4")  # type: ignore[arg-type]


def test_policies_hand_the_option_on() -> None:
    network = deep("dit")
    peaks = {}
    for entries in ("compute", "float8"):
        for name, options in {"fora": {}, "delta_dit": {"share": 1.0}}.items():
            policy = catalog.find("methods", name)(cache_dtype=entries, **options)
            with policy.on(network, policy.calibrate(network, calls("dit"))) as put_on:
                for call in calls("dit"):
                    output(network.module, call)
            peaks[name, entries] = put_on.peak_bytes
    tokens, width = 2 * 16, 64
    assert peaks["fora", "compute"] == 2 * DEPTH * tokens * width * 4
    assert peaks["fora", "float8"] == 2 * DEPTH * tokens * (width + 4)
    assert peaks["delta_dit", "compute"] == tokens * width * 4
    assert peaks["delta_dit", "float8"] == tokens * (width + 4)


def double(_: nn.Module, __: Any, made: Tensor) -> None:
    """A hook that writes into what a module gave."""
    made.mul_(2)


def test_outputs_that_are_written_into_are_no_outputs_to_keep() -> None:
    network = opened("dit")
    given = calls("dit")
    with caching(network, half(network)):
        output(network.module, given[0])
        hook = network.module.get_submodule("transformer_blocks.1.ff").register_forward_hook(double)
        output(network.module, given[1])
        with pytest.raises(
            AerogelError, match=r"what transformer_blocks.1.ff gave was changed in place .* or keep copies with cache_dtype: float8"
        ):
            output(network.module, given[2])
    with caching(network, half(network)):
        output(network.module, given[0])
        with pytest.raises(AerogelError, match=r"what transformer_blocks.1.ff gave was changed in place"):
            output(network.module, given[1])
    with caching(network, half(network), store="float8"):
        assert all(output(network.module, call).isfinite().all() for call in given)
    hook.remove()


def test_streams_that_are_written_into_have_no_change() -> None:
    network = deep("dit")
    hook = network.module.get_submodule("transformer_blocks.2").register_forward_hook(lambda _, args, made: double(_, made, args[0]))
    with (
        caching_blocks(network, AT, partial(TableRule, ((2, DEPTH),), [None, 0, 0, None])),
        pytest.raises(AerogelError, match="what goes into a block was changed in place"),
    ):
        output(network.module, calls("dit")[0])
    hook.remove()


def test_inference_mode_counts_nothing_and_works() -> None:
    network = opened("dit")
    with caching(network, half(network)):
        wanted = [output(network.module, call) for call in calls("dit")]
    with torch.inference_mode(), caching(network, half(network)):
        assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit"), wanted, strict=True))
