"""Learning-to-Cache against its loop written out, what it may touch and what it may not, and what is saved of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising, generate_images
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.l2c import L2c, L2cTraining
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.budgets import Budget, budget_of
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.controlled import ControlledDenoiser, controlled
from aerogel.runtime.feature_cache.replay import output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule
from tests.runtime.feature_cache.test_replay import SAMPLERS, dit_pipeline, recorded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

SHORT: dict[str, Any] = {"ratio": 0.4, "iterations": 12, "check": 6}


def training(network: Network, denoiser: ControlledDenoiser, calls: list[Call], seed: int = 0, **options: Any) -> L2cTraining:
    budget = Budget((1.0,) * len(cached_modules_of(network)), 4.0)
    return L2cTraining(
        L2c(**SHORT | options), denoiser, replays(network, Trajectories.of(network, calls)), budget, torch.Generator().manual_seed(seed)
    )


@contextmanager
def mixing(network: Network, kept: list[Any], score_N: Tensor | None) -> Iterator[None]:
    """Modules by plain hooks: without scores they leave what they gave, with scores they mix it in."""

    def hook(place: int, given: Tensor) -> Tensor:
        if score_N is None:
            kept[place] = given.detach()
            return given
        return score_N[place] * given + (1 - score_N[place]) * kept[place]

    handles = [
        network.module.get_submodule(name).register_forward_hook(lambda _, __, given, place=place: hook(place, given))
        for place, name in enumerate(cached_modules_of(network))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def literal(
    network: Network, teacher: Network, calls: list[Call], steps: int, iterations: int, rate: float, penalty: float
) -> tuple[Tensor, Tensor]:
    """The rule for DDIM and two guidance branches in plain formulas: the scores (T, N) afterwards, and the last gradient (N)."""
    generator, alpha = torch.Generator().manual_seed(0), network.processor.scheduler.alphas_cumprod
    level = [(1000 // steps) * place for place in reversed(range(steps))]
    runs = [calls[start : start + steps] for start in range(0, len(calls), steps)]

    def stepped(x: Tensor, eps: Tensor, step: int) -> Tensor:
        now, then = alpha[level[step]], alpha[level[step + 1]] if step + 1 < steps else torch.tensor(1.0)
        return then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps

    def answer(run: list[Call], step: int, x: Tensor, asked: Network = network) -> Tensor:
        given: Tensor = asked.module(torch.cat([x, x]), **run[step].kwargs)[0]
        return given

    def advanced(run: list[Call], step: int, x: Tensor, asked: Network = network) -> Tensor:
        label, nothing = answer(run, step, x, asked).chunk(2)
        return stepped(x, nothing + 3.0 * (label - nothing), step)

    logits_TN = torch.full((steps, 2), torch.inf)
    logits_TN[1::2] = torch.randn(steps // 2, 2, generator=generator)
    clean = []
    for run in runs:
        x = run[0].args[0].chunk(2)[0]
        for step in range(steps):
            with torch.no_grad():
                x = advanced(run, step, x, teacher)
        clean.append(x)
    torch.randn(clean[0].shape, generator=generator)  # for the measurements
    moment_TN, square_TN, count_T, gradient_N = torch.zeros(steps, 2), torch.zeros(steps, 2), [0] * steps, torch.zeros(2)
    for _ in range(iterations):
        step = 1 + 2 * int(torch.randint(steps // 2, (), generator=generator))
        number = int(torch.randint(len(runs), (), generator=generator))
        noise, run, kept = torch.randn(clean[number].shape, generator=generator), runs[number], [None, None]
        x = alpha[level[step - 1]].sqrt() * clean[number] + (1 - alpha[level[step - 1]]).sqrt() * noise
        with torch.no_grad():
            with mixing(network, kept, None):
                x = advanced(run, step - 1, x)
            wanted = answer(run, step, x, teacher)
        logits_N = logits_TN[step].clone().requires_grad_()
        with mixing(network, kept, logits_N.sigmoid()):
            loss = ((answer(run, step, x) - wanted) ** 2).mean() + penalty * logits_N.sigmoid().sum()
        (gradient_N,) = torch.autograd.grad(loss, logits_N)
        count_T[step] += 1
        moment_TN[step] = 0.9 * moment_TN[step] + 0.1 * gradient_N
        square_TN[step] = 0.999 * square_TN[step] + 0.001 * gradient_N**2
        moment_N, square_N = moment_TN[step] / (1 - 0.9 ** count_T[step]), square_TN[step] / (1 - 0.999 ** count_T[step])
        logits_TN[step] = (logits_TN[step] - rate * moment_N / (square_N.sqrt() + 1e-8)).clamp(-5, 5)
    return logits_TN.sigmoid(), gradient_N


@pytest.mark.parametrize(
    ("steps", "iterations", "penalty", "taught"), [(5, 1, 1e-6, False), (5, 8, 1e-4, False), (6, 8, 1e-5, False), (5, 8, 1e-6, True)]
)
def test_scores_move_as_the_rule_says(steps: int, iterations: int, penalty: float, taught: bool) -> None:
    """With a teacher too, from which the network at hand has moved away: images and answers are the teacher's, what is kept is not."""
    network = dit_pipeline()
    calls = recorded(network, steps=steps)
    if taught:
        network.teacher = dit_pipeline()
        with torch.no_grad():
            network.module.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
    with controlled(network) as denoiser:
        made = training(network, denoiser, calls, rate=0.5, penalty=penalty)
        before = made.scores()
        for _ in range(iterations):
            made.update()
        last_N = next(row_N.grad for row_N in made.rows.values() if row_N.grad is not None)
    wanted_TN, gradient_N = literal(network, network.teacher or network, calls, steps, iterations, 0.5, penalty)
    torch.testing.assert_close(last_N, gradient_N, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(made.scores(), wanted_TN, rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, made.scores())


def test_only_the_row_at_hand_moves() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, recorded(network))
        assert list(made.rows) == [1, 3]
        seen = set()
        for _ in range(12):
            before = made.scores()
            made.update()
            graded = [step for step, row_N in made.rows.items() if row_N.grad is not None]
            moved = (made.scores() != before).any(-1).nonzero().flatten().tolist()
            assert len(graded) == 1
            assert moved == graded
            seen.update(moved)
    assert seen == {1, 3}
    assert torch.equal(made.scores()[0::2], torch.ones(3, 2)), "the others always compute"
    assert made.images == 24


def test_scores_stay_within_their_bound() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, recorded(network), rate=50.0)
        for _ in range(8):
            made.update()
    assert all(torch.equal(row_N.abs(), torch.full_like(row_N, 5.0)) for row_N in made.rows.values())


def test_clean_pictures_are_those_that_the_pipeline_made() -> None:
    network = dit_pipeline()
    wanted = Denoising(count=4, steps=5, batch=2, guidance=3.0)
    with controlled(network) as denoiser:
        clean = training(network, denoiser, recorded(network)).clean
    vae = network.processor.vae
    for latent, made in zip(clean, generate_images(network.processor, wanted), strict=True):
        with torch.no_grad():
            image = (vae.decode(latent / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(image, made.images_NCHW, rtol=1e-3, atol=1e-3)


def test_scores_end_in_the_order_of_what_reuse_costs() -> None:
    """Measured by reusing one module alone, on other noise than the scores were trained with."""
    network = dit_pipeline()
    with torch.no_grad():
        network.module.transformer_blocks[0].ff.net[2].weight.mul_(4)
    with controlled(network) as denoiser:
        made = training(network, denoiser, recorded(network), rate=0.2, penalty=3e-6)
        for _ in range(120):
            made.update()
        costs = {}
        for step in made.rows:
            state = made.noised(made.runs[0], made.clean[0], step - 1)
            with torch.no_grad():
                whole, held = denoiser.step(made.runs[0].call(state), [True, True], denoiser.empty)
                call = made.runs[0].call(made.runs[0].advance(state, output_of(whole)))
                for module in range(2):
                    given, _ = denoiser.step(call, [module != 0, module != 1], held)
                    costs[step, module] = float((output_of(given) - output_of(denoiser.plain(call))).square().mean())
    scores_TN = made.scores()
    assert (
        sorted(costs, key=costs.__getitem__) == sorted(costs, key=lambda entry: float(scores_TN[entry])) == [(3, 0), (3, 1), (1, 0), (1, 1)]
    )


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    count: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        yield count
    finally:
        handle.remove()


def test_an_iteration_is_three_forwards() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    totals = []
    for iterations in (4, 12):
        with counted(network.module) as count:
            L2c(**SHORT | {"iterations": iterations, "check": 100}).calibrate(network, calls)
        totals.append(len(count))
    assert totals[1] - totals[0] == 3 * 8
    # The guidance and ends of two generations, the proof of one; images of the whole network, of two measurements, and of other noise.
    assert totals[0] - 3 * 4 == 2 * (1 + 5) + 5 + (1 + 2 + 3 + 3) * 5


@pytest.mark.parametrize(("steps", "ratio"), [(5, 0.1), (5, 0.3), (5, 0.4), (6, 0.5), (2, 0.5)])
def test_the_budget_is_met_exactly_by_every_second_step(steps: int, ratio: float) -> None:
    network = dit_pipeline()
    schedule = Schedule.of(network, L2c(**SHORT | {"ratio": ratio}).calibrate(network, recorded(network, steps=steps)))
    assert schedule.reused == pytest.approx(ratio, abs=0.5 / schedule.computed_TN.numel())
    assert schedule.computed_TN[0::2].all()


def test_a_target_speedup_is_met_by_the_costs() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    state = L2c(target_speedup=1.1, by="macs", iterations=2).calibrate(network, calls)
    assert budget_of(network, Trajectories.of(network, calls), None, 1.1, "macs").is_met(Schedule.of(network, state).computed_TN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, r"means to save 5; l2c trains every second step only, caching all 2 modules at 2 of 5 steps saves 4"),
        ({"ratio": None, "target_speedup": 1.5, "by": "macs"}, "means to save .* every second step only"),
        ({"ratio": 0.9}, "cannot be had"),
        ({"ratio": None}, "give one of ratio"),
        ({"iterations": 0}, "from 1 to"),
        ({"check": 0}, "from 1 to"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(options: dict[str, Any], message: str) -> None:
    network = dit_pipeline()
    calls = recorded(network)
    with counted(network.module) as count, pytest.raises(AerogelError, match=message):
        L2c(**SHORT | options).calibrate(network, calls)
    assert len(count) <= ("target_speedup" in options), "a forward is counted for its costs, none is trained on"


def test_answers_that_are_not_finite_are_told() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    with torch.no_grad():
        network.module.proj_out_2.bias[0] = torch.nan
    with pytest.raises(AerogelError, match="scores are not finite after 12 iterations"):
        L2c(**SHORT).calibrate(network, calls)


def test_a_sampler_that_cannot_noise_is_refused() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    network.processor.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(AerogelError, match="FlowMatchEulerDiscreteScheduler does not noise clean images"):
        L2c(**SHORT).calibrate(network, calls)


def test_lowest_scores_are_reused_first_and_ties_fall_to_what_saves_most_then_to_late_steps() -> None:
    network = dit_pipeline()
    with controlled(network) as denoiser:
        made = training(network, denoiser, recorded(network))
        for step, logits in {1: [-2.0, -2.0], 3: [-2.0, 1.0]}.items():
            made.rows[step].data = torch.tensor(logits)
        for cost_N, saving, reused in (
            ((1.0, 1.0), 1.0, [[3, 0]]),
            ((1.0, 2.0), 2.0, [[1, 1]]),
            ((1.0, 1.0), 3.0, [[1, 0], [1, 1], [3, 0]]),
            ((1.0, 1.0), 4.0, [[1, 0], [1, 1], [3, 0], [3, 1]]),
        ):
            made.budget = Budget(cost_N, saving)
            assert (~made.decoded()).nonzero().tolist() == reused


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pictures_are_noised_as_their_sampler_does(sampler: str, guidance: float) -> None:
    """Signal and noise of each level by the sampler's own tables, and the step from there begins anew."""
    network = dit_pipeline(sampler)
    with controlled(network) as denoiser:
        made = training(network, denoiser, recorded(network, guidance=guidance))
        run, clean = made.runs[0], made.clean[0]
        for step in made.rows:
            alpha = run.sampler.alphas_cumprod[int(run.sampler.timesteps[step - 1])]
            before = made.generator.get_state()
            state = made.noised(run, clean, step - 1)
            noise = torch.randn(clean.shape, generator=made.generator.set_state(before))
            torch.testing.assert_close(state.x_BCHW, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, rtol=1e-4, atol=1e-4)
            assert run.advance(state, output_of(denoiser.plain(run.call(state)))).x_BCHW.isfinite().all()
        made.update()
    assert getattr(run.sampler, "step_index", None) is None, "the recorded sampler is left at its start"


def test_the_log_says_what_the_schedules_cost() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    state = L2c(**SHORT).calibrate(network, calls)
    assert [entry["iterations"] for entry in state.log] == [0, 6, 12]
    assert state.images == 24
    assert all(entry["soft_error"] > 0 <= entry["hard_error"] for entry in state.log)
    assert state.log[-1]["decoded_error"] > 0
    assert state.error > state.error_without_reuse == pytest.approx(0)


def test_compress_keeps_it_beside_the_weights(tmp_path: Path) -> None:
    source = dit_pipeline().processor
    source.save_pretrained(tmp_path / "source")
    recipe = {"name": "router", "steps": [{"l2c": SHORT}]}
    wanted = Denoising(count=2, steps=5, batch=2, guidance=3.0)
    result = aerogel.compress(tmp_path / "source", recipe, samples=wanted, output=tmp_path / "out", measures=())
    state = result.policies[0].state
    opened = aerogel.load(tmp_path / "out", lazy=False)
    plain = aerogel.load(tmp_path / "source", lazy=False)
    seed = {"class_labels": [0], "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt"}
    cached, whole = (network.processor(generator=torch.Generator().manual_seed(0), **seed).images for network in (opened, plain))
    assert not torch.equal(torch.as_tensor(cached), torch.as_tensor(whole))
    kept = {"scores", "computed", "steps", "modules", "sampler", "guidance", "images", "error", "error_without_reuse", "log"}
    assert kept <= state.as_dict().keys()
    with pytest.raises(AerogelError, match="one of the 7 steps of DDIMScheduler"):
        opened.processor(class_labels=[0], num_inference_steps=7)
