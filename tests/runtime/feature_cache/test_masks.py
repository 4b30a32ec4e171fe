"""Masks by trial: errors are those of the runtime, forks change nothing, budgets are exact, searches find what trying all finds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.kernels import synchronized_clock
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.budgets import Budget, budget_of
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, costs_of
from aerogel.runtime.feature_cache.controlled import controlled
from aerogel.runtime.feature_cache.masks import Moves, Search
from aerogel.runtime.feature_cache.replay import Replay, output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from aerogel.runtime.feature_cache.trials import Trials
from tests.clocks import Ticks
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

T, N = 5, 2


@pytest.fixture
def network() -> Network:
    return dit_pipeline()


@pytest.fixture
def runs(network: Network) -> list[Replay]:
    return replays(network, Trajectories.of(network, recorded(network)))


@pytest.fixture
def trials(network: Network, runs: list[Replay]) -> Iterator[Trials]:
    with controlled(network) as denoiser, torch.no_grad():
        yield Trials(denoiser, runs, [run.start() for run in runs])


def mask(*reused: tuple[int, int]) -> Tensor:
    made = torch.ones(T, N, dtype=torch.bool)
    for entry in reused:
        made[entry] = False
    return made


def test_the_error_is_that_of_the_runtime(network: Network, runs: list[Replay]) -> None:
    chosen = mask((1, 0), (3, 1), (4, 0))
    whole = [run.finish(run.start(), lambda _, call: output_of(network.run(call))) for run in runs]
    schedule = Schedule(runs[0].steps, "", tuple(cached_modules_of(network)), chosen)
    with caching(network, schedule):
        cached = [run.finish(run.start(), lambda _, call: output_of(network.run(call))) for run in runs]
    wanted = torch.stack([(a - b).square().mean() for a, b in zip(cached, whole, strict=True)]).mean()
    with controlled(network) as denoiser, torch.no_grad():
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
    step = trials.controlled.step
    monkeypatch.setattr(trials.controlled, "step", lambda *given: ran.append(given) or step(*given))
    trials.error(mask((3, 0)))
    assert len(ran) == 2 * (T - 3), "two generations"


@pytest.mark.parametrize("saving", [2.0, 3.0])
def test_a_search_finds_what_trying_all_finds(saving: float, trials: Trials) -> None:
    entries = [(step, module) for step in range(1, T) for module in range(N)]
    least = min(trials.error(mask(*chosen)) for chosen in combinations(entries, int(saving)))
    budget = Budget((1.0, 1.0), saving)
    search = Search(trials, budget, 10**6)
    found = search.swaps(search.single_modules(mask()))
    assert budget.saved(found) == saving
    assert trials.error(found) == pytest.approx(least, rel=1e-6)
    errors = [error for _, error in search.log]
    assert errors[-1] <= errors[int(saving)], "exchanges never make it worse"


@pytest.mark.parametrize("whole", [False, True])
def test_products_say_what_each_part_alone_does_to_the_error(whole: bool, trials: Trials) -> None:
    """Exactly, as a squared distance is what its parts are with themselves and twice with each other."""
    settled = mask((1, 0), (1, 1)) if whole else mask((1, 0), (3, 1))
    parts = (
        [((step, 0), (step, 1)) for step in range(1, T)] if whole else [((step, module),) for step in range(1, T) for module in range(N)]
    )
    error = trials.settle(settled)
    moves = Search(trials, Budget((1.0, 1.0), 2.0), 10**6).moves(settled, parts)
    assert float(moves.products[0, 0]) == pytest.approx(error, rel=1e-5)
    assert moves.parts == parts[::-1]
    for place, part in enumerate(moves.parts):
        other = settled.clone()
        for entry in part:
            other[entry] ^= True
        added = moves.products[[0, 1 + place]][:, [0, 1 + place]].sum()
        assert float(added) == pytest.approx(trials.error(other), rel=1e-4, abs=1e-5 * float(moves.products.max()))
        assert moves.runs[place] == bool(settled[part[0]])


def test_long_vectors_are_hashed_to_nearly_the_same_products(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    trials.settle(mask((1, 0), (3, 1)))
    others = [mask((2, 0)), mask((4, 1), (1, 1)), mask((3, 0), (3, 1))]
    whole = [trials.apart(), *(trials.apart(other) for other in others)]
    monkeypatch.setattr("aerogel.runtime.feature_cache.trials.KEPT_VALUES", len(whole[0]) // 2)
    hashed = [trials.apart(), *(trials.apart(other) for other in others)]
    assert len(hashed[0]) == len(whole[0]) // 2
    exact, near = trials.products(whole), trials.products(hashed)
    norms = exact.diagonal().sqrt()
    assert float(((near - exact) / (norms[:, None] * norms)).abs().max()) < 0.15


@pytest.mark.parametrize("seed", range(6))
def test_chains_take_the_best_exchange_after_those_before(seed: int, trials: Trials) -> None:
    """Against all exchanges tried on the quadratic form, one after another."""
    settled = mask((1, 0), (1, 1), (2, 0), (3, 1))
    search = Search(trials, Budget((1.0, 1.0), 4.0), 10**6)
    search.settle(settled)
    found = search.moves(settled, [((step, module),) for step in range(1, T) for module in range(N)])
    vectors = torch.randn(1 + len(found.parts), 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[1:] = vectors[1:] / 2 - vectors[0] / 6
    moves = Moves(found.parts, found.runs, vectors @ vectors.T)

    def promised(entries: list[int]) -> float:
        return float((vectors[0] + vectors[[1 + entry for entry in entries]].sum(0)).square().sum())

    literal: list[int] = []
    while True:
        free = [place for place in range(len(moves.parts)) if place not in literal]
        tries = [(promised([*literal, a, b]), a, b) for a in free if not moves.runs[a] for b in free if moves.runs[b]]
        if not tries or min(tries)[0] >= promised(literal):
            break
        literal += min(tries)[1:]
    wanted = [(moves.parts[a], moves.parts[b]) for a, b in zip(literal[::2], literal[1::2], strict=True)]
    chains = list(moves.chains(partial(search.swapped, settled)))
    assert [len(one) for one in chains] == [length for length in (len(wanted) >> shift for shift in range(9)) if length > 1]
    assert all(list(one) == wanted[: len(one)] for one in chains)
    singles = list(moves.pairs())
    assert [one[0] for one in singles[:1]] == wanted[:1]
    errors = [promised([moves.parts.index(part) for part in one[0]]) for one in singles]
    assert errors == sorted(errors)
    assert len(singles) == 4 * 4, "those that promise nothing too, behind the others"


def test_exchanges_have_to_please_others_too(trials: Trials, runs: list[Replay]) -> None:
    """Others for whom all is well as it is let nothing pass."""
    start = mask((1, 0), (2, 1))
    budget = Budget((1.0, 1.0), 2.0)
    assert not torch.equal(Search(trials, budget, 10**6).swaps(start), start)
    others = Trials(trials.controlled, runs, [run.noise(torch.Generator().manual_seed(5)) for run in runs])
    others.exact = others.images(start)
    assert torch.equal(Search(trials, budget, 10**6, others).swaps(start), start)


def test_exchanges_keep_to_an_uneven_budget(trials: Trials) -> None:
    """A dear module rests for a cheap one only where there is something to spare."""
    budget = Budget((2.0, 1.0), 3.0)
    found = Search(trials, budget, 10**6).swaps(mask((1, 0), (2, 1)))
    assert budget.is_met(found)
    entries = [(step, module) for step in range(1, T) for module in range(N)]
    pairs = [mask(*chosen) for chosen in combinations(entries, 2)]
    assert trials.error(found) == pytest.approx(min(trials.error(one) for one in pairs if budget.saved(one) == 3), rel=1e-6)


def test_whole_steps_stay_within_the_budget(trials: Trials) -> None:
    found = Search(trials, Budget((1.0, 1.0), 5.0), 10**6).whole_steps((T, N))
    assert int((~found).sum()) == 4
    assert (found[0]).all()
    assert (found.all(-1) | ~found.any(-1)).all()
    pairs = [mask(*((step, module) for step in chosen for module in range(N))) for chosen in combinations(range(1, T), 2)]
    assert trials.error(found) == pytest.approx(min(map(trials.error, pairs)), rel=1e-6), "exchanges mend what greed has missed"


@pytest.mark.parametrize("max_age", [1, 2])
@pytest.mark.parametrize("spent", [False, True])
def test_a_search_keeps_to_a_bound_on_age(max_age: int, spent: bool, trials: Trials) -> None:
    """All that can be saved under it: every pick has to leave room for the rest."""
    most = 2.0 * {1: 2, 2: 3}[max_age]
    budget = Budget((1.0, 1.0), most).with_max_reuse(max_age, T)
    search = Search(trials, budget, 0 if spent else 10**6)
    starts = [mask(), search.whole_steps((T, N))]
    found = [search.swaps(search.single_modules(start)) for start in starts]
    for made in found:
        assert budget.is_met(made)
        assert budget.allowed(made)
    if not spent:
        entries = [(step, module) for step in range(1, T) for module in range(N)]
        every = [made for chosen in combinations(entries, int(most)) if budget.allowed(made := mask(*chosen))]
        assert min(map(trials.error, found)) == pytest.approx(min(map(trials.error, every)), rel=1e-6)


def test_a_search_stops_at_its_limit(trials: Trials) -> None:
    search = Search(trials, Budget((1.0, 1.0), 4.0), 10)
    found = search.swaps(search.single_modules(search.whole_steps((T, N))))
    assert search.budget.is_met(found)
    assert trials.count <= 10 + T


def test_a_search_without_trials_left_takes_late_steps(trials: Trials) -> None:
    found = Search(trials, Budget((1.0, 1.0), 3.0), 0).single_modules(mask())
    assert found.tolist() == mask((4, 0), (4, 1), (3, 0)).tolist()


def test_decoding_is_exact() -> None:
    """What is not needed runs again, so that no single cache entry could be taken back."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        cost_N = tuple((torch.rand(3, generator=generator) + 0.1).tolist())
        saving = float(torch.rand((), generator=generator)) * 5 * sum(cost_N)
        entries = [(step, module) for step in range(1, 6) for module in range(3)]
        order = [entries[place] for place in torch.randperm(len(entries), generator=generator).tolist()]
        budget = Budget(cost_N, saving)
        made = budget.decoded(order, (6, 3))
        assert budget.is_met(made)
        assert made[0].all()
        for entry in (~made).nonzero().tolist():
            more = made.clone()
            more[tuple(entry)] = True
            assert not budget.is_met(more)


@pytest.mark.parametrize("by", ["macs", "latency"])
def test_a_target_speedup_is_what_the_costs_say(by: Any, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synchronized_clock, "host_clock", Ticks(network))
    budget = budget_of(network, Trajectories.of(network, recorded(network)), None, 1.1, by)
    costs = costs_of(network, recorded(network)[0])
    whole, cost_N = (3, (1, 1)) if by == "latency" else (costs.macs, costs.module_macs)
    assert budget.cost_N == cost_N
    assert budget.saving == pytest.approx(T * whole * (1 - 1 / 1.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, None), "give one of ratio"),
        ((0.5, 2.0), "give one of ratio"),
        ((0.9, None), "a ratio of 0.9 cannot be had"),
        ((-0.1, None), "a ratio of -0.1 cannot be had"),
        ((None, 0.9), "a speed-up of 0.9 by macs cannot be had"),
        ((None, 50.0), "a speed-up of 50.0 by macs cannot be had: it saves .*all 2 modules at all but the first of 5 steps"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(options: tuple[Any, Any], message: str, network: Network) -> None:
    with pytest.raises(AerogelError, match=message):
        budget_of(network, Trajectories.of(network, recorded(network)), *options, "macs")
