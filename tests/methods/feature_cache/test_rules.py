"""Rules that need no training: which steps they reuse, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.fora import Fora
from aerogel.methods.feature_cache.pab import Pab, broadcast
from aerogel.methods.feature_cache.smoothcache import Smoothcache, smooth
from aerogel.methods.feature_cache.taylorseer import Taylorseer
from aerogel.methods.feature_cache.uniform_cache import UniformCache, spread
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from aerogel.runtime.feature_cache.taylor import TaylorSeries
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded
from tests.runtime.feature_cache.test_schedule import calls as generation
from tests.tiny import opened, output


def rows(computed_TN: Tensor) -> list[int]:
    assert (computed_TN.all(-1) | ~computed_TN.any(-1)).all(), "whole steps"
    return (~computed_TN[:, 0]).nonzero().flatten().tolist()


@pytest.mark.parametrize(("interval", "reused"), [(1, []), (2, [1, 3]), (3, [1, 2, 4]), (9, [1, 2, 3, 4])])
def test_fora_computes_every_nth_step(interval: int, reused: list[int]) -> None:
    network = dit_pipeline()
    schedule = Schedule.of(network, Fora(interval).calibrate(network, recorded(network)))
    assert rows(schedule.computed_TN) == reused
    assert schedule.reused == pytest.approx(len(reused) / 5)
    assert schedule.sampler == "DDIMScheduler"


@pytest.mark.parametrize(
    ("ratio", "first", "reused"),
    [(0.5, 1, [1, 3, 5, 7, 9]), (0.3, 1, [1, 5, 9]), (0.2, 1, [1, 9]), (0.3, 3, [3, 6, 9]), (0.0, 1, []), (0.9, 1, [*range(1, 10)])],
)
def test_evenly_spaced_steps(ratio: float, first: int, reused: list[int]) -> None:
    assert (~spread(10, ratio, first)).nonzero().flatten().tolist() == reused


def test_evenly_is_fora_at_a_half() -> None:
    network = dit_pipeline()
    calls = recorded(network, steps=6)
    fora, evenly = Fora(2).calibrate(network, calls), UniformCache(0.5).calibrate(network, calls)
    assert fora.computed == evenly.computed


def test_rules_that_cannot_be_are_refused() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    with pytest.raises(AerogelError, match="option 'interval': expected a number from 1 to 1,000,000, got 0"):
        Fora(0).calibrate(network, calls)
    with pytest.raises(AerogelError, match=r"a ratio of 0.9 means that 4 of 5 steps reuse; from step 2 on there are 3"):
        UniformCache(0.9, first=2).calibrate(network, calls)
    with pytest.raises(AerogelError, match="option 'first': expected a number from 1 to 1,000,000, got 0"):
        UniformCache(0.5, first=0).calibrate(network, calls)


def paint(pipeline: Any) -> Tensor:
    made = pipeline(class_labels=[0, 7], num_inference_steps=5, generator=torch.Generator().manual_seed(9), output_type="pt")
    return torch.as_tensor(made.images)


def test_searched_meets_its_budget_and_beats_even_spacing() -> None:
    network = dit_pipeline()
    calls = recorded(network, count=4, batch=4)
    errors = {}
    for name, step in {
        "schedule_search": {"schedule_search": {"ratio": 0.4, "trials": 300}},
        "uniform_cache": {"uniform_cache": {"ratio": 0.4}},
    }.items():
        with aerogel.cached(network, {"steps": [step]}, samples=calls) as found:
            state = found[0].state
            assert Schedule.of(network, state).reused == pytest.approx(0.4)
            assert name == "uniform_cache" or (0 < state.error_of_trials != state.error > 0)
            made = paint(network.processor)
        errors[name] = float((made - paint(network.processor)).square().mean())
    assert errors["schedule_search"] < errors["uniform_cache"]


@pytest.mark.parametrize(
    ("every", "runs"), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, [0, 1, 2, 4, 6, 8, 9]), (3, [0, 1, 2, 5, 8, 9]), (6, [0, 1, 2, 8, 9])]
)
def test_pab_runs_now_and_then_within_its_window(every: int, runs: list[int]) -> None:
    """Steps 900, 800, ... 0: the window from 100 to 800 holds 700 to 200; the run before it is the first to be broadcast."""
    found = broadcast([900.0 - 100 * place for place in range(10)], every, 100.0, 800.0)
    held = [place for place in range(2, 8) if not found[place]]
    assert found[0]
    assert found[1]
    assert found[8]
    assert found[9]
    distances = [place - max(run for run in range(place) if found[run]) for place in held]
    assert all(distance < every for distance in distances)
    assert len(held) == {1: 0, 2: 3, 3: 4, 6: 5}[every]


def test_pab_treats_kinds_apart() -> None:
    network = opened("pixart")
    state = Pab(self_every=2, cross_every=3, first=-1, last=1000).calibrate(network, generation("pixart"))
    columns = {module.kind: [int(row[place]) for row in state.computed] for place, module in enumerate(cached_modules_of(network).values())}
    assert columns == {"self-attention": [1, 0, 1, 0], "cross-attention": [1, 0, 0, 1], "feed-forward": [1, 1, 1, 1]}
    with pytest.raises(AerogelError, match="expected a number from 1 to"):
        Pab(self_every=0).calibrate(network, generation("pixart"))


def test_smoothcache_takes_the_longest_stretch_that_changes_little() -> None:
    change_TA = torch.tensor(
        [[0.0, 0.0, 0.0], [0.05, 0, 0], [0.05, 0.07, 0], [0.05, 0.09, 0.2], [0.01, 0.02, 0.03], [0.01, 0.02, 0.03], [0.01, 0.01, 0.01]]
    )
    assert smooth(change_TA, 0.08) == [True, False, False, True, False, False, True]
    assert smooth(change_TA, 0.0) == [True] * 7
    assert smooth(change_TA[:, :1], 9.0) == [True, False, True, False, True, False, True], "one step at most, and never the last"


def test_smoothcache_measures_changes_of_outputs() -> None:
    network = opened("pixart")
    given = generation("pixart")
    state = Smoothcache(alpha=0.1, longest=2).calibrate(network, given)
    name = next(name for name, module in cached_modules_of(network).items() if module.kind == "cross-attention")
    every = [name for name, module in cached_modules_of(network).items() if module.kind == "cross-attention"]
    made: dict[str, list[Tensor]] = {name: [] for name in every}
    hooks = [
        network.module.get_submodule(name).register_forward_hook(lambda *call, name=name: made[name].append(call[2])) for name in every
    ]
    for call in given:
        output(network.module, call)
    for hook in hooks:
        hook.remove()
    literal = sum(float((outputs[2] - outputs[0]).abs().sum() / outputs[0].abs().sum()) for outputs in made.values()) / len(every)
    assert float(state.changes["cross-attention.change"][2, 1]) == pytest.approx(literal, rel=1e-5)
    assert name in made
    with pytest.raises(AerogelError, match="7 recorded calls are not generations of 4 steps"):
        Smoothcache().calibrate(network, [*given, *given[:3]])


def test_taylorseer_predicts_by_the_series() -> None:
    """Outputs at steps 0, 2 and 4, then two steps ahead: value + s x first difference + s^2 / 2 x second."""
    values = {0: 1.0, 2: 4.0, 4: 5.0}
    entry = TaylorSeries(lambda row: torch.tensor([values[row]]), order=2)
    entry.keeps = True
    for row in (0, 2, 4):
        entry.computes, entry.row = True, row
        assert float(entry(row)) == values[row]
    first, second = (5 - 4) / 2, ((5 - 4) / 2 - (4 - 1) / 2) / 2
    entry.computes = False
    for ahead in (1, 2):
        entry.row = 4 + ahead
        assert float(entry(None)) == pytest.approx(5 + ahead * first + ahead**2 / 2 * second)


@pytest.mark.parametrize(
    ("options", "runs"), [({}, [0, 1, 5, 9]), ({"interval": 3, "warmup": 3}, [0, 1, 2, 5, 8, 11]), ({"interval": 1}, list(range(12)))]
)
def test_taylorseer_computes_at_these_steps(options: dict[str, int], runs: list[int]) -> None:
    state = Taylorseer(**options).calibrate(opened("dit"), generation("dit", steps=[900.0 - 75 * step for step in range(12)]))
    assert state.computed == tuple("1111" if step in runs else "0000" for step in range(12))


def test_taylorseer_of_order_zero_reuses() -> None:
    """And one of order 1 has the history it needs, across steps that compute."""
    network, given = opened("dit"), generation("dit")
    state = Taylorseer(interval=2, order=0, warmup=1).calibrate(network, given)
    with caching(network, Schedule.of(network, state)):
        wanted = [output(network.module, call) for call in given]
    for order, same in ((0, True), (1, False)):
        with Taylorseer(interval=2, order=order, warmup=1).on(network, state):
            found = [output(network.module, call) for call in given]
        assert torch.equal(found[1], wanted[1]), "no difference is known yet"
        assert torch.equal(found[3], wanted[3]) == same
    with pytest.raises(AerogelError, match="option 'order': expected a number from 0 to 1,000,000, got -1"):
        Taylorseer(order=-1).calibrate(network, given)
