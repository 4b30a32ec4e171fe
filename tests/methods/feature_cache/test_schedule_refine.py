"""A schedule that is gone on with: what it starts from, what it keeps, and what a recipe makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine import policies
from aerogel.engine.planning import plan
from aerogel.engine.search.pacing import candidates
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.schedule_refine import ScheduleRefine
from aerogel.methods.feature_cache.uniform_cache import UniformCache
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.cached_modules import costs_of
from aerogel.runtime.feature_cache.controlled import controlled
from aerogel.runtime.feature_cache.replay import replays
from aerogel.runtime.feature_cache.router import RouterState
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState
from aerogel.runtime.feature_cache.trials import Trials
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

QUANTIZED: list[dict[str, Any]] = [
    {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear"]}},
    {"activation_ranges": {"start": "minmax", "steps": 0, "targets": ["Linear"]}},
]


def error(network: Network, calls: Any, state: ScheduleState) -> float:
    """On the recorded generations, with nothing on."""
    runs = replays(network, Trajectories.of(network, calls))
    with controlled(network) as denoiser, torch.no_grad():
        return Trials(denoiser, runs, [run.start() for run in runs]).error(Schedule.of(network, state).computed_TN)


def test_it_goes_on_from_the_schedule_and_saves_as_much() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    before = UniformCache(ratio=0.4).calibrate(network, calls)
    torch.manual_seed(0)
    after = ScheduleRefine(trials=300, samples=4).revise(network, calls, before)
    macs = torch.tensor(costs_of(network, calls[0]).module_macs)
    saved = [float((~Schedule.of(network, state).computed_TN * macs).sum()) for state in (before, after)]
    assert saved[1] >= saved[0]
    assert after.changed > 0, "even spacing is not the best that there is"
    assert error(network, calls, after) < error(network, calls, before)
    assert after.error < after.error_before, "on noise that nothing was decided by"


def test_without_trials_the_schedule_stays_and_so_does_what_was_learned() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    evenly = UniformCache(ratio=0.4).calibrate(network, calls)
    before = RouterState(**vars(evenly), scores=torch.rand(5, 2), guidance=3.0, error=0.1, error_without_reuse=0.0, log=())
    after = ScheduleRefine(trials=0, samples=2).revise(network, calls, before)
    assert after.computed == before.computed
    assert after.changed == 0
    assert after.error == after.error_before
    assert torch.equal(after.kept["scores"], before.scores)


def test_generations_of_other_steps_are_refused() -> None:
    network = dit_pipeline()
    before = UniformCache(ratio=0.4).calibrate(network, recorded(network))
    with pytest.raises(AerogelError, match="the schedule before schedule_refine is of 5 steps, the recorded generations have 4 others"):
        ScheduleRefine().revise(network, recorded(network, steps=4), before)


def test_a_recipe_alternates(tmp_path: Path) -> None:
    """Quantize, search on that, measure ranges under the cache, search again: one schedule is on at the end, the last one."""
    steps = [
        *QUANTIZED,
        {"schedule_search": {"ratio": 0.4, "trials": 30, "samples": 2}},
        {"recalibrate": {}},
        {"schedule_refine": {"trials": 60, "samples": 2}},
    ]
    dit_pipeline().processor.save_pretrained(tmp_path / "in")
    wanted = Denoising(count=2, steps=5, batch=2, guidance=3.0)
    result = aerogel.compress(tmp_path / "in", {"steps": steps}, samples=wanted, output=tmp_path / "out", measures=())
    (only,) = result.policies
    assert only.step.name == "schedule_refine"
    assert {"changed", "error_before", "computed", "macs_saved"} <= only.state.as_dict().keys()
    (again,) = policies.load(tmp_path / "out")
    assert again.state.computed == only.state.computed
    opened = aerogel.load(tmp_path / "out", lazy=False)
    assert torch.as_tensor(opened.processor(class_labels=[0], num_inference_steps=5, output_type="pt").images).isfinite().all()


def test_a_live_pipeline_goes_on_too() -> None:
    network = dit_pipeline()
    recipe = {"steps": [{"uniform_cache": {"ratio": 0.4}}, {"schedule_refine": {"trials": 60, "samples": 2}}]}
    with aerogel.cached(network.processor, recipe, samples=Denoising(count=2, steps=5, batch=2, guidance=3.0)) as found:
        assert [one.step.name for one in found] == ["schedule_refine"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"schedule_refine": {}}],
            "schedule_refine goes on from a schedule of reuse, and there is no policy before it; put one such as harmonica",
        ),
        ([{"taylorseer": {}}, {"schedule_refine": {}}], "and the policy before it is taylorseer"),
        ([{"first_block": {}}, {"schedule_refine": {}}], "and the policy before it is first_block"),
        (
            [{"uniform_cache": {"ratio": 0.4}}, {"schedule_refine": {}}, {"fora": {}}],
            "fora comes after schedule_refine, and a model has one feature cache",
        ),
    ],
)
def test_a_plan_says_what_it_cannot_go_on_from(steps: list[dict[str, Any]], message: str) -> None:
    assert any(message in problem for problem in plan(dit_pipeline(), {"steps": steps}).problems)


def test_a_live_pipeline_says_what_it_cannot_go_on_from() -> None:
    recipe = {"steps": [{"taylorseer": {}}, {"schedule_refine": {}}]}
    with (
        pytest.raises(AerogelError, match="and the policy before it is taylorseer"),
        aerogel.cached(dit_pipeline().processor, recipe, samples=Denoising(count=2, steps=5, batch=2, guidance=3.0)),
    ):
        pass


def test_a_search_for_a_cache_does_not_try_it() -> None:
    assert "schedule_refine" not in [candidate.name for candidate in candidates()]
    with pytest.raises(AerogelError, match="schedule_refine goes on from another policy's schedule, so it is no cache to choose"):
        candidates(["schedule_refine"])


def test_by_itself_it_is_refused() -> None:
    network = dit_pipeline()
    (step,) = Recipe.parse({"steps": [{"schedule_refine": {}}]}).steps
    with pytest.raises(AerogelError, match="schedule_refine goes on from a schedule: put a policy that reuses by one before it"):
        policies.calibrated(network, step, recorded(network))
