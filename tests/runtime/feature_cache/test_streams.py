"""Steps are followed by their place: samplers that repeat steps, other dtypes, a step for each token, runs that begin in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.engine import policies
from aerogel.engine.policies import CalibratedPolicy
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState, caching, schedule_state
from tests.image_pipelines import classes
from tests.runtime.feature_cache.test_schedule import literal
from tests.tiny import FAMILIES, opened, output

HEUN = (900.0, 600.0, 600.0, 300.0, 300.0)


def calls(name: str, steps: Sequence[float], dtype: torch.dtype = torch.float32) -> list[Call]:
    found = []
    for call, step in zip(FAMILIES[name].calls(len(steps)), steps, strict=True):
        found.append(Call((), call.kwargs | {"timestep": torch.full_like(call.kwargs["timestep"], step, dtype=dtype)}))
    return found


def calibrated(network: Network, step: dict[str, Any], given: Sequence[Call]) -> CalibratedPolicy:
    (made,) = Recipe.parse({"steps": [step]}).steps
    return policies.calibrated(network, made, given, None)


def scattered(network: Network, rows: int) -> Tensor:
    computed_TN = torch.rand(rows, len(cached_modules_of(network)), generator=torch.Generator().manual_seed(3)) > 0.5
    computed_TN[0] = True
    return computed_TN


def same(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def table(network: Network, steps: Sequence[float], computed_TN: Tensor) -> Schedule:
    return Schedule(tuple(steps), "", tuple(cached_modules_of(network)), computed_TN)


def test_a_step_that_comes_twice_has_two_rows() -> None:
    network, given = opened("dit"), calls("dit", HEUN)
    assert Trajectories.of(network, given * 2).steps == HEUN
    computed_TN = scattered(network, len(HEUN))
    wanted = literal(network, given, computed_TN)
    with caching(network, table(network, HEUN, computed_TN)):
        made = [output(network.module, call) for call in given * 2]
    assert same(made, wanted * 2)


def test_guidance_in_calls_of_its_own_is_told_from_a_repeated_step() -> None:
    network, first = opened("dit"), calls("dit", HEUN)
    second = [Call((), call.kwargs | {"class_labels": (call.kwargs["class_labels"] + 1) % 10}) for call in first]
    both = [call for pair in zip(first, second, strict=True) for call in pair]
    assert Trajectories.of(network, both * 2).steps == HEUN
    computed_TN = scattered(network, len(HEUN))
    wanted = [literal(network, branch, computed_TN) for branch in (first, second)]
    with caching(network, table(network, HEUN, computed_TN)):
        made = [output(network.module, call) for call in both]
    assert same(made[::2], wanted[0])
    assert same(made[1::2], wanted[1])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_pipeline_whose_sampler_repeats_steps(name: str) -> None:
    pipeline, sampler = classes(), getattr(diffusers, name)()
    pipeline.register_modules(scheduler=sampler)
    pipeline.set_progress_bar_config(disable=True)
    network = aerogel.load(pipeline)
    found = calibrated(network, {"fora": {"interval": 2}}, record(pipeline, network.module, Denoising(2, 4, batch=2)))

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipeline(class_labels=[0], num_inference_steps=4, generator=generator, output_type="pt").images)

    plain = run()
    assert isinstance(found.state, ScheduleState)
    assert found.state.steps == tuple(sampler.timesteps.tolist())
    with policies.on(network, [found]):
        first, second = run(), run()
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize(
    ("recorded", "given"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"), ("float64", "float32")]
)
def test_steps_in_another_dtype_are_the_same_steps(recorded: str, given: str) -> None:
    network, steps = opened("flux"), (0.9937, 0.7412, 0.4123, 0.123)
    trajectories = Trajectories.of(network, calls("flux", steps, getattr(torch, recorded)))
    state = schedule_state(network, trajectories, lambda rows, _: scattered(network, rows))
    later = calls("flux", steps, getattr(torch, given))
    wanted = literal(network, later, Schedule.of(network, state).computed_TN)
    with caching(network, Schedule.of(network, state)):
        assert same([output(network.module, call) for call in later], wanted)
    first, other = calls("flux", (0.9937, 0.76), getattr(torch, given))
    with caching(network, Schedule.of(network, state)):
        output(network.module, first)
        with pytest.raises(AerogelError, match=r"time step 0\.7\d+ is not the 0\.74"):
            output(network.module, other)


def by_token(call: Call) -> Call:
    """The tokens of the first frame are those of a given image."""
    step_BFN = call.kwargs["timestep"][:, None, None].expand(-1, 3, 16).clone()
    step_BFN[:, 0] = 0
    return Call((), call.kwargs | {"timestep": step_BFN.flatten(1)})


def test_a_time_step_for_each_token() -> None:
    network, steps = opened("wan"), (900.0, 600.0, 300.0)
    given = [by_token(call) for call in calls("wan", steps)]
    assert Trajectories.of(network, given).steps == steps
    computed_TN = torch.tensor([[True], [False], [True]]).expand(-1, len(cached_modules_of(network)))
    wanted = literal(network, given, computed_TN)
    with caching(network, table(network, steps, computed_TN)):
        assert same([output(network.module, call) for call in given], wanted)
    with pytest.raises(AerogelError, match="a time step for each token"):
        calibrated(network, {"toca": {}}, given)


def test_a_run_may_begin_in_the_middle() -> None:
    network, given = opened("dit"), calls("dit", HEUN)
    computed_TN = scattered(network, len(HEUN))
    first_TN = computed_TN[3:].clone()
    first_TN[0] = True
    wanted = literal(network, given[3:], first_TN)
    with caching(network, table(network, HEUN, computed_TN)):
        for _ in range(2):
            assert same([output(network.module, call) for call in given[3:]], wanted)
        output(network.module, given[0])
        with pytest.raises(AerogelError, match="time step 300 is not the 600 that comes at step 2 of the 5"):
            output(network.module, given[3])


def test_the_sampler_says_where_a_run_begins() -> None:
    network, given = opened("dit"), calls("dit", HEUN)
    network.processor = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor(HEUN), begin_index=2))
    computed_TN = torch.ones(len(HEUN), len(cached_modules_of(network)), dtype=torch.bool)
    with caching(network, table(network, HEUN, computed_TN)):
        for call in given[2:]:
            output(network.module, call)


def test_two_caches_are_refused() -> None:
    network, given = opened("wan"), calls("wan", (900.0, 600.0))
    found = calibrated(network, {"fora": {"interval": 2}}, given)
    with policies.on(network, [found]):
        with pytest.raises(AerogelError, match="a feature cache is on this WanTransformer3DModel already"), policies.on(network, [found]):
            pass
        output(network.module, given[0])
    denoiser: Any = network.module
    config = diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    message = "a cache of diffusers .PyramidAttentionBroadcastConfig. is on"
    denoiser.enable_cache(config)
    with pytest.raises(AerogelError, match=message), policies.on(network, [found]):
        pass
    with pytest.raises(AerogelError, match=message):
        calibrated(network, {"fora": {}}, given)
    denoiser.disable_cache()
    with policies.on(network, [found]):
        output(denoiser, given[0])
        denoiser.enable_cache(config)
        with pytest.raises(AerogelError, match=message):
            output(denoiser, given[1])
        denoiser.disable_cache()
