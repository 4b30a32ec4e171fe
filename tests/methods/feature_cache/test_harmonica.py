"""HarmoniCa's router against loops written out, what it may touch and what it may not, and what is saved of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.harmonica import Harmonica, HarmonicaTraining
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.budgets import Budget, budget_of
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.controlled import ControlledDenoiser, controlled
from aerogel.runtime.feature_cache.masks import Search
from aerogel.runtime.feature_cache.replay import Replay, State, output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule
from aerogel.runtime.feature_cache.trials import Trials
from tests.runtime.feature_cache.test_replay import apart, clips, dit_pipeline, packed, recorded

SHORT: dict[str, Any] = {"ratio": 0.4, "trajectories": 6, "refresh": 3}


def training(network: Network, denoiser: ControlledDenoiser, runs: list[Replay], **options: Any) -> HarmonicaTraining:
    method = Harmonica(**SHORT | options)
    budget = Budget((1.0,) * len(cached_modules_of(network)), 4.0)
    return HarmonicaTraining(method, denoiser, runs, budget, torch.Generator().manual_seed(0))


def soft(denoiser: ControlledDenoiser, run: Replay, state: State, scores_TN: Tensor, full: set[int]) -> Tensor:
    """A whole generation under scores, in which some steps compute everything."""
    state, held = state.fork(), denoiser.empty
    for step, score_N in enumerate(scores_TN):
        made, held = denoiser.step(run.call(state), [True] * len(score_N) if step in full else score_N, held, 0.1)
        state = run.advance(state, output_of(made))
    return state.x_BCHW


@torch.no_grad()
def test_leave_one_out_is_what_whole_generations_say() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))))
        made.measure(0)
        run, start = made.fixed
        scores_TN = made.scores()
        image = soft(denoiser, run, start, scores_TN, set())
        literal = torch.tensor([float((soft(denoiser, run, start, scores_TN, {step}) - image).square().mean()) for step in range(5)])
    assert literal[0] == 0
    torch.testing.assert_close(made.lambda_T, literal / literal[1:].mean(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_cumulative_is_what_whole_generations_say() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))), proxy="cumulative")
        made.measure(0)
        run, start = made.fixed
        images = [soft(denoiser, run, start, made.scores(), set(range(step + 1, 5))) for step in range(5)]
        literal = torch.tensor([0.0, *(float((b - a).square().mean()) for a, b in pairwise(images))])
    torch.testing.assert_close(made.lambda_T, literal / literal[1:].mean(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_step_that_computes_everything_has_no_weight() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))))
        made.rows[3].fill_(torch.inf)
        made.measure(0)
    assert made.lambda_T[3] == 0
    assert (made.lambda_T[[1, 2, 4]] > 0).all()


def test_a_trajectory_moves_each_row_once_by_its_own_loss() -> None:
    """Against the loop of the paper written out, with gradients of the row at hand only."""
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))))
        before = torch.stack([row_N.detach().clone() for row_N in made.rows.values()])
        run, start = made.begin()
        made.trajectory(run, start.fork())
        after = torch.stack([row_N.detach() for row_N in made.rows.values()])
        state, held = start.fork(), denoiser.empty
        for step in range(5):
            logits_N = before[step].clone().requires_grad_()
            call = run.call(state)
            with torch.no_grad():
                wanted = run.guided(output_of(denoiser.plain(call)))
            output, held = denoiser.step(call, logits_N.sigmoid(), held, 0.1)
            given = output_of(output)
            if step:
                loss = (run.guided(given) - wanted).square().mean() / wanted.var() + made.penalty * logits_N.sigmoid().sum()
                (gradient_N,) = torch.autograd.grad(loss, logits_N)
                # The first step of Adam is the learning rate against the gradient's sign, whatever its size.
                moved_N = before[step] - made.options.rate * gradient_N / (gradient_N.abs() + 1e-8)
                torch.testing.assert_close(after[step], moved_N.clamp(-5, 5), rtol=1e-3, atol=1e-4)
            state = run.advance(state, given)
    assert torch.equal(after[0], torch.full_like(after[0], 5.0)), "the first row never moves"


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8])
def test_the_budget_is_met_exactly(ratio: float) -> None:
    network = dit_pipeline()
    calls = recorded(network)
    state = Harmonica(**SHORT | {"ratio": ratio}).calibrate(network, calls)
    schedule = Schedule.of(network, state)
    assert schedule.reused == pytest.approx(ratio, abs=0.5 / schedule.computed_TN.numel())
    assert schedule.computed_TN[0].all()


@pytest.mark.parametrize("search", [0, 30])
@pytest.mark.parametrize(("max_age", "ratio"), [(1, 0.4), (2, 0.6)])
def test_no_unit_is_reused_longer_than_it_may(max_age: int, ratio: float, search: int) -> None:
    """Where the budget is all that the bound leaves room for."""
    network = dit_pipeline()
    options = SHORT | {"ratio": ratio, "search": search, "samples": 4, "max_age": max_age}
    schedule = Schedule.of(network, Harmonica(**options).calibrate(network, recorded(network)))
    lines = ["".join("1" if runs else "0" for runs in unit_T) for unit_T in schedule.computed_TN.T.tolist()]
    assert max(len(range_) for line in lines for range_ in line.split("1")) == max_age
    assert schedule.reused == pytest.approx(ratio)


@pytest.mark.parametrize("pipeline", [packed, clips])
def test_denoisers_whose_pipelines_do_it_otherwise_learn_too(pipeline: Callable[[], tuple[Network, list[Call]]]) -> None:
    """Flux: joint blocks give text and image, single blocks rest as wholes, its sampler is told a shift. Wan: two calls a step."""
    network, calls = pipeline()
    torch.manual_seed(0)
    method = Harmonica(**SHORT, search=20, samples=2)
    state = method.calibrate(network, calls)
    schedule = Schedule.of(network, state)
    assert schedule.reused == pytest.approx(0.4, abs=0.5 / schedule.computed_TN.numel())
    assert schedule.steps == Trajectories.of(network, calls).steps
    run = replays(network, Trajectories.of(network, calls))[0]
    with controlled(network) as denoiser, torch.no_grad():
        error = Trials(denoiser, [run], [run.start()]).error(schedule.computed_TN)
    whole = run.finish(run.start(), lambda _, call: output_of(network.run(call)))

    def one_by_one(_: int, call: Call) -> Tensor:
        halves = apart([call]) if run.halves else [call]
        return torch.cat([output_of(network.run(half)) for half in halves])

    with method.on(network, state):
        cached = run.finish(run.start(), one_by_one)
    assert float((cached - whole).square().mean()) == pytest.approx(error, rel=1e-4)
    assert error > 0


@pytest.mark.parametrize("search", [0, 20])
def test_without_a_budget_the_threshold_decides_and_the_penalty_stays(search: int) -> None:
    network = dit_pipeline()
    options = SHORT | {"ratio": None, "penalty": 3e-2, "trajectories": 30, "threshold": 0.5, "search": search, "samples": 4}
    state = Harmonica(**options).calibrate(network, recorded(network))
    schedule, low_TN = Schedule.of(network, state), state.scores <= 0.5
    assert state.penalty == 3e-2
    assert low_TN.any()
    assert int((~schedule.computed_TN).sum()) == int(low_TN.sum()), "a search keeps the count"
    if not search:
        assert torch.equal(schedule.computed_TN, ~low_TN)


def test_a_threshold_with_a_bound_on_age_runs_what_would_grow_too_old() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))), ratio=None, max_age=2)
        for row, logits in enumerate([[5.0, 5.0], [-5.0, 3.0], [-5.0, -5.0], [-5.0, -5.0], [-5.0, -5.0]]):
            made.rows[row].data = torch.tensor(logits)
        made.budget = Budget((1.0, 1.0), 0.0, 2)
        assert (~made.decoded()).nonzero().tolist() == [[1, 0], [2, 0], [2, 1], [3, 1], [4, 0]]
        assert made.budget.saving == 5


def test_a_bound_on_age_passes_over_low_scores() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))))
        for row, logits in enumerate([[5.0, 5.0], [1.0, 3.0], [-2.0, 3.0], [-3.0, 3.0], [-1.0, 2.0]]):
            made.rows[row].data = torch.tensor(logits)
        for max_age, reused in ((0, [[2, 0], [3, 0], [4, 0]]), (1, [[1, 0], [3, 0], [4, 1]]), (2, [[2, 0], [3, 0], [4, 1]])):
            made.budget = Budget((1.0, 1.0), 3.0, max_age)
            assert (~made.decoded()).nonzero().tolist() == reused


def test_a_budget_that_the_bound_on_age_forbids_is_refused_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    network = dit_pipeline()
    monkeypatch.setattr(HarmonicaTraining, "run", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(
        AerogelError, match=r"means to save 5; with max_age 1 each of 2 modules is cached at 2 of 5 steps at most, .* saves 4"
    ):
        Harmonica(**SHORT | {"ratio": 0.5, "max_age": 1}).calibrate(network, recorded(network))


def test_checkpointing_changes_no_score() -> None:
    """Forks, measurements and search included."""
    states = []
    for checkpointing in (False, True):
        network = dit_pipeline()
        torch.manual_seed(7)
        options = SHORT | {"search": 10, "samples": 4, "checkpointing": checkpointing}
        states.append(Harmonica(**options).calibrate(network, recorded(network)))
        assert not any("forward" in vars(module) for module in network.module.modules())
    torch.testing.assert_close(states[1].scores, states[0].scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(states[1].lambda_T, states[0].lambda_T, rtol=1e-4, atol=1e-6)
    assert states[1].computed == states[0].computed


def test_a_target_speedup_is_met_by_the_costs() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    state = Harmonica(target_speedup=1.15, by="macs", trajectories=2).calibrate(network, calls)
    budget = budget_of(network, Trajectories.of(network, calls), None, 1.15, "macs")
    assert budget.is_met(Schedule.of(network, state).computed_TN)


def test_lowest_scores_are_reused_first_and_ties_fall_to_what_costs_the_image_least() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))))
        for row, logits in enumerate([[5.0, 5.0], [-5.0, -5.0], [1.0, -2.0], [-5.0, -5.0], [3.0, 0.0]]):
            made.rows[row].data = torch.tensor(logits)
        made.lambda_T = torch.tensor([0.0, 1.0, 1.0, 0.1, 1.0])
        for saving, reused in ((2.0, [[3, 0], [3, 1]]), (5.0, [[1, 0], [1, 1], [2, 1], [3, 0], [3, 1]])):
            made.budget = Budget((1.0, 1.0), saving)
            assert (~made.decoded()).nonzero().tolist() == reused


def test_the_search_behind_it_keeps_the_better_of_two_starts() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser, torch.no_grad():
        made = training(network, denoiser, replays(network, Trajectories.of(network, recorded(network))), search=200, samples=4)
        decoded = made.decoded()
        generator = made.generator.get_state()
        found = made.searched(decoded)
        made.generator.set_state(generator)
        search = Search(made.trials(), made.budget, 10**6)
        assert made.budget.is_met(found)
        ends = [search.swaps(decoded), search.swaps(search.single_modules(search.whole_steps(tuple(decoded.shape))))]
        assert search.trials.error(found) == pytest.approx(min(map(search.trials.error, ends)), rel=1e-5)


def test_the_router_s_own_schedule_stays_beside_what_the_search_made_of_it() -> None:
    states = []
    for search in (0, 60):
        torch.manual_seed(3)
        network = dit_pipeline()
        states.append(Harmonica(**SHORT, search=search, samples=4).calibrate(network, recorded(network)))
    assert states[1].decoded == states[0].computed
    assert states[0].decoded is None, "it is the schedule itself"
    assert sum(row.count("0") for row in states[1].computed) == 4


def test_the_penalty_follows_the_budget() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    little, much = (
        Harmonica(**SHORT | {"ratio": ratio, "trajectories": 60, "refresh": 60}).calibrate(network, calls) for ratio in (0.1, 0.8)
    )
    assert little.penalty < much.penalty


def test_compress_keeps_it_beside_the_weights(tmp_path: Path) -> None:
    source = dit_pipeline().processor
    source.save_pretrained(tmp_path / "source")
    recipe = {"name": "router", "steps": [{"harmonica": SHORT | {"search": 30}}]}
    wanted = Denoising(count=2, steps=5, batch=2, guidance=3.0)
    result = aerogel.compress(tmp_path / "source", recipe, samples=wanted, output=tmp_path / "out", measures=())
    state = result.policies[0].state
    opened = aerogel.load(tmp_path / "out", lazy=False)
    plain = aerogel.load(tmp_path / "source", lazy=False)
    seed = {"class_labels": [0], "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt"}
    cached, whole = (network.processor(generator=torch.Generator().manual_seed(0), **seed).images for network in (opened, plain))
    assert not torch.equal(torch.as_tensor(cached), torch.as_tensor(whole))
    assert {"scores", "lambda", "computed", "steps", "modules", "sampler", "guidance", "error", "log"} <= state.as_dict().keys()
    assert state.log[0]["hard_error"] >= 0
    assert "decoded_error" in state.log[-1]
    with pytest.raises(
        AerogelError, match=r"852, one of the 7 steps of DDIMScheduler, is not the 800 that comes at step 1 of the 5 of DDIMScheduler"
    ):
        opened.processor(class_labels=[0], num_inference_steps=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trajectories": 0}, "from 1 to"),
        ({"refresh": 0}, "from 1 to"),
        ({"search": -1}, "from 0 to"),
        ({"samples": 0}, "option 'samples': expected a number from 1 to 1,000,000, got 0"),
        ({"max_age": -1}, "option 'max_age': expected a number from 0 to 1,000,000, got -1"),
        ({"threshold": 0.995}, "option 'threshold': expected a number from 0 to below 0.993307, got 0.995"),
        ({"threshold": -0.1}, "got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    network = dit_pipeline()
    with pytest.raises(AerogelError, match=message):
        Harmonica(**SHORT | options).calibrate(network, recorded(network))
