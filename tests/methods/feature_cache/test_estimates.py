"""What a plan says of the time that learning and searching take, against the forwards that are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aerogel
from aerogel.engine.calibration import reading
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.feature_cache.policy import ScheduleRefiner
from aerogel.recipe import Recipe
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

LEARNED: dict[str, dict[str, Any]] = {
    "harmonica": {"ratio": 0.4, "trajectories": 20, "refresh": 5},
    "harmonica and search": {"ratio": 0.4, "trajectories": 2, "search": 40, "samples": 4},
    "schedule_search": {"ratio": 0.4, "trials": 60, "samples": 4},
    "schedule_refine": {"trials": 60, "samples": 4},
    "l2c": {"ratio": 0.3, "iterations": 60},
}
PASSED = {"harmonica": 0.72, "harmonica and search": 1.69, "schedule_search": 1.56, "schedule_refine": 1.71, "l2c": 1.0}
"""Positions that pass, to those of the plan: gradients are in the plan and make no forward; few trials fork late on so short a run."""


@pytest.mark.parametrize("name", LEARNED)
def test_positions_that_pass_are_about_those_of_the_plan(name: str) -> None:
    network = dit_pipeline()
    calls = recorded(network, steps=10)
    (step,) = Recipe.parse({"steps": [{name.partition(" ")[0]: LEARNED[name]}]}).steps
    method = step.method
    assert isinstance(method, RuntimePolicy)
    read, passed = reading(network, calls), 0

    def see(_: Any, args: Any, kwargs: dict[str, Any], *__: Any) -> None:
        nonlocal passed
        passed += len(args[0] if args else kwargs["hidden_states"]) * read.sample

    hook = network.module.register_forward_hook(see, with_kwargs=True)
    if isinstance(method, ScheduleRefiner):
        (first,) = Recipe.parse({"steps": [{"uniform_cache": {"ratio": 0.4}}]}).steps
        assert isinstance(first.method, RuntimePolicy)
        method.revise(network, calls, first.method.calibrate(network, calls))
    else:
        torch.manual_seed(0)
        method.calibrate(network, calls)
    hook.remove()
    assert read.steps == 10
    assert passed / method.cost(read).model_tokens == pytest.approx(PASSED[name], rel=0.1)


def test_a_plan_counts_what_is_learned() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    seconds = [
        aerogel.plan(network, {"steps": [{"harmonica": {"ratio": 0.4, "trajectories": count}}]}, samples=calls).seconds["compress"]
        for count in (1000, 100000)
    ]
    assert seconds[1] > 20 * seconds[0]
