"""Recorded generations by step and guidance branch: steps, whole runs, joined branches, and what is refused."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.trajectories import Trajectories
from tests.runtime.feature_cache.test_schedule import STEPS, calls
from tests.tiny import opened


def given(*calls: Call) -> Trajectories:
    return Trajectories.of(opened("dit"), calls)


def test_steps_are_those_of_one_generation() -> None:
    own = calls("dit")
    assert given(*own).steps == STEPS
    assert given(*own * 2).steps == STEPS
    twice = [call for call in own for _ in range(2)]
    assert given(*twice * 2).steps == STEPS
    assert (given(*twice * 2).sampler, given(*twice).calls) == ("", tuple(twice))
    with pytest.raises(AerogelError, match="no recorded calls"):
        _ = given().steps
    with pytest.raises(AerogelError, match="no recorded calls"):
        _ = given().first
    with pytest.raises(AerogelError, match="no timestep"):
        _ = given(Call(own[0].args[:1], {})).steps


def test_runs_are_whole_generations() -> None:
    own = calls("dit")
    runs = given(*own * 2).runs
    assert [run.steps for run in runs] == [STEPS, STEPS]
    assert [run.calls for run in runs] == [tuple(own)] * 2
    with pytest.raises(AerogelError, match="recorded calls are not generations of"):
        _ = given(*own, own[0]).runs


def test_branches_in_calls_of_their_own_become_halves_of_a_batch() -> None:
    own = calls("dit")
    other = [Call(call.args, call.kwargs | {"class_labels": call.kwargs["class_labels"] + 1}) for call in own]
    (run,) = given(*(call for pair in zip(own, other, strict=True) for call in pair)).runs
    assert run.cfg_batch
    assert run.steps == STEPS
    for joined, first, second in zip(run.calls, own, other, strict=True):
        assert torch.equal(joined.kwargs["class_labels"], torch.cat([first.kwargs["class_labels"], second.kwargs["class_labels"]]))
    longer = [Call(call.args, call.kwargs | {"class_labels": torch.stack([call.kwargs["class_labels"]] * 2, 1)}) for call in own]
    with pytest.raises(AerogelError, match="pad their prompts to one length"):
        _ = given(*(call for pair in zip(own, longer, strict=True) for call in pair)).runs
