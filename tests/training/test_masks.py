"""Masks by trial: errors are those of the runtime, forks change nothing, budgets are exact, searches find what trying all finds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.data.replay import Replay, output_of, replays
from aerogel.errors import AerogelError
from aerogel.model.network import Network
from aerogel.model.reuse.driven import driven
from aerogel.model.reuse.schedule import Schedule, reusing
from aerogel.model.reuse.units import units_of
from aerogel.training.budgets import Budget, budget_of
from aerogel.training.masks import Search, Trials
from tests.data.test_replay import painter, recorded

T, N = 5, 2


@pytest.fixture
def network() -> Network:
    return painter()


@pytest.fixture
def runs(network: Network) -> list[Replay]:
    return replays(network, recorded(network))


@pytest.fixture
def trials(network: Network, runs: list[Replay]) -> Iterator[Trials]:
    with driven(network) as denoiser, torch.no_grad():
        yield Trials(denoiser, runs, [run.start() for run in runs])


def mask(*reused: tuple[int, int]) -> Tensor:
    made = torch.ones(T, N, dtype=torch.bool)
    for slot in reused:
        made[slot] = False
    return made


def test_the_error_is_that_of_the_runtime(network: Network, runs: list[Replay]) -> None:
    chosen = mask((1, 0), (3, 1), (4, 0))
    whole = [run.finish(run.start(), lambda _, call: output_of(network.run(call))) for run in runs]
    schedule = Schedule(runs[0].steps, "", tuple(units_of(network)), chosen)
    with reusing(network, schedule):
        cached = [run.finish(run.start(), lambda _, call: output_of(network.run(call))) for run in runs]
    wanted = torch.stack([(a - b).square().mean() for a, b in zip(cached, whole, strict=True)]).mean()
    with driven(network) as denoiser, torch.no_grad():
        trials = Trials(denoiser, runs, [run.start() for run in runs])
        assert trials.error(mask()) == 0
        assert trials.error(chosen) == pytest.approx(float(wanted), rel=1e-5)


def test_forks_give_what_whole_generations_give(trials: Trials) -> None:
    settled, others = mask((1, 0), (2, 1)), [mask(), mask((1, 0), (2, 1), (4, 0)), mask((1, 0)), mask((4, 1)), mask((1, 0), (2, 1))]
    before = [trials.error(other) for other in others]
    assert trials.settle(settled) == pytest.approx(trials.error(settled), rel=1e-6)
    assert [trials.error(other) for other in others] == before
    assert trials.count == 2 * len(others) + 1


def test_a_fork_costs_only_the_steps_behind_it(trials: Trials, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    trials.settle(mask())
    ran: list[object] = []
    step = trials.driven.step
    monkeypatch.setattr(trials.driven, "step", lambda *given: ran.append(given) or step(*given))
    trials.error(mask((3, 0)))
    assert len(ran) == 2 * (T - 3), "two generations"


@pytest.mark.parametrize("saving", [2.0, 3.0])
def test_a_search_finds_what_trying_all_finds(saving: float, trials: Trials) -> None:
    slots = [(step, unit) for step in range(1, T) for unit in range(N)]
    least = min(trials.error(mask(*chosen)) for chosen in combinations(slots, int(saving)))
    budget = Budget((1.0, 1.0), saving)
    search = Search(trials, budget, 10**6)
    found = search.swaps(search.single_units(mask()))
    assert budget.saved(found) == saving
    assert trials.error(found) == pytest.approx(least, rel=1e-6)
    errors = [error for _, error in search.log]
    assert errors[-1] <= errors[int(saving)], "exchanges never make it worse"


def test_whole_steps_stay_within_the_budget(trials: Trials) -> None:
    found = Search(trials, Budget((1.0, 1.0), 5.0), 10**6).whole_steps((T, N))
    assert int((~found).sum()) == 4
    assert (found[0]).all()
    assert (found.all(-1) | ~found.any(-1)).all()
    pairs = [mask(*((step, unit) for step in chosen for unit in range(N))) for chosen in combinations(range(1, T), 2)]
    assert trials.error(found) == pytest.approx(min(map(trials.error, pairs)), rel=1e-6), "exchanges mend what greed has missed"


@pytest.mark.parametrize("max_age", [1, 2])
@pytest.mark.parametrize("spent", [False, True])
def test_a_search_keeps_to_a_bound_on_age(max_age: int, spent: bool, trials: Trials) -> None:
    """All that can be saved under it: every pick has to leave room for the rest."""
    most = 2.0 * {1: 2, 2: 3}[max_age]
    budget = Budget((1.0, 1.0), most).aged(max_age, T)
    search = Search(trials, budget, 0 if spent else 10**6)
    starts = [mask(), search.whole_steps((T, N))]
    found = [search.swaps(search.single_units(start)) for start in starts]
    for made in found:
        assert budget.met(made)
        assert budget.allowed(made)
    if not spent:
        slots = [(step, unit) for step in range(1, T) for unit in range(N)]
        every = [made for chosen in combinations(slots, int(most)) if budget.allowed(made := mask(*chosen))]
        assert min(map(trials.error, found)) == pytest.approx(min(map(trials.error, every)), rel=1e-6)


def test_a_search_stops_at_its_limit(trials: Trials) -> None:
    search = Search(trials, Budget((1.0, 1.0), 4.0), 10)
    found = search.swaps(search.single_units(search.whole_steps((T, N))))
    assert search.budget.met(found)
    assert trials.count <= 10 + T


def test_a_search_without_trials_left_takes_late_steps(trials: Trials) -> None:
    found = Search(trials, Budget((1.0, 1.0), 3.0), 0).single_units(mask())
    assert found.tolist() == mask((4, 0), (4, 1), (3, 0)).tolist()


def test_decoding_is_exact() -> None:
    """What is not needed runs again, so that no single slot could be taken back."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        cost_N = tuple((torch.rand(3, generator=generator) + 0.1).tolist())
        saving = float(torch.rand((), generator=generator)) * 5 * sum(cost_N)
        slots = [(step, unit) for step in range(1, 6) for unit in range(3)]
        order = [slots[place] for place in torch.randperm(len(slots), generator=generator).tolist()]
        budget = Budget(cost_N, saving)
        made = budget.decoded(order, (6, 3))
        assert budget.met(made)
        assert made[0].all()
        for slot in (~made).nonzero().tolist():
            more = made.clone()
            more[tuple(slot)] = True
            assert not budget.met(more)


@pytest.mark.parametrize("by", ["macs", "latency"])
def test_a_target_speedup_is_what_the_costs_say(by: Any, network: Network) -> None:
    budget = budget_of(network, recorded(network), None, 1.1, by)
    whole = budget.saving / T / (1 - 1 / 1.1)
    assert sum(budget.cost_N) < whole
    assert T * whole / (T * whole - budget.saving) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ((None, None), "give one of ratio"),
        ((0.5, 2.0), "give one of ratio"),
        ((0.9, None), "a ratio of 0.9 cannot be had"),
        ((-0.1, None), "a ratio of -0.1 cannot be had"),
        ((None, 0.9), "a speed-up of 0.9 by macs cannot be had"),
        ((None, 50.0), "a speed-up of 50.0 by macs cannot be had: it means to save .*all 2 units at all but the first of 5 steps"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(knobs: tuple[Any, Any], message: str, network: Network) -> None:
    with pytest.raises(AerogelError, match=message):
        budget_of(network, recorded(network), *knobs, "macs")
