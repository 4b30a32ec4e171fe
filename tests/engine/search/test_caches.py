"""The search for a cache: equal measured speed, errors of other noise, fewer steps beside, and a folder that puts the best one on.

Time is told by a clock that moves when a module of the denoiser runs, or the denoiser itself: no test waits for a busy machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, generate_images, record
from aerogel.engine.opening import open_model
from aerogel.engine.progress import Event
from aerogel.engine.search.pacing import Attempt, Candidate, SpeedBudget, candidates
from aerogel.engine.search.searching import Findings, search
from aerogel.errors import AerogelError
from aerogel.evaluate.image_similarity import png
from aerogel.methods.feature_cache.fora import Fora
from aerogel.methods.feature_cache.policy import BudgetedCachePolicy, FeatureCachePolicy, SchedulePolicy
from aerogel.methods.feature_cache.uniform_cache import spread
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.replay import output_of, replays
from aerogel.runtime.feature_cache.schedule import ScheduleState, schedule_state
from tests import image_pipelines
from tests.clocks import Ticks
from tests.tiny import FAMILIES

WANTED = Denoising(count=3, steps=6, batch=2, guidance=3.0)
EVERY_SECOND = [[1.0, 1.0], [0.0, 0.0]] * 3


def dit_pipeline() -> diffusers.DiTPipeline:
    pipeline = image_pipelines.classes()
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return pipeline


def searched(pipeline: Any, *only: str, **options: Any) -> Findings:
    clock = options.pop("clock", None) or Ticks(open_model(pipeline))
    return search(pipeline, **{"samples": WANTED, "only": only, "clock": clock, "rounds": 1} | options)


def rows(findings: Findings) -> dict[str, Any]:
    return {row["policy"]: row for row in findings.facts["rows"]}


def reasons(findings: Findings) -> dict[str, str]:
    return {row["policy"]: row["reason"] for row in findings.facts["left_out"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Findings, Path]:
    pipeline, folder = dit_pipeline(), tmp_path_factory.mktemp("search") / "out"
    return pipeline, searched(pipeline, "fora", "uniform_cache", "taylorseer", "pab", "first_block", output=folder), folder


def test_the_weakest_setting_that_is_fast_enough_is_taken(found: Any) -> None:
    """A run is 6 x (1 + 2 modules) = 18 ticks; with half of the modules 12."""
    made = rows(found[1])
    assert {name: (row["option"], row["value"], row["speedup"]) for name, row in made.items()} == {
        "fora": ("interval", 2, 1.5),
        "uniform_cache": ("ratio", 0.45, 1.5),
        "taylorseer": ("interval", 3, 1.5),
    }
    assert made["fora"]["step"]["fora"]["interval"] == 2
    assert {one["value"]: one["speedup"] for one in made["uniform_cache"]["tries"]} == pytest.approx(
        {0.55: 1.5, 0.3: 18 / 14, 0.45: 1.5, 0.4: 18 / 14}
    )


def test_who_is_too_slow_or_refuses_is_told_with_a_reason(found: Any) -> None:
    assert reasons(found[1]) == {
        "pab": "it makes denoising 1.29 times as fast at the most (self_every 6)",
        "first_block": "first 1 and last 0 leave nothing of 1 blocks to be left out",
    }


def test_more_is_reused_for_more_speed() -> None:
    findings = searched(dit_pipeline(), "fora", "uniform_cache", budget="1.7x")
    assert (rows(findings)["fora"]["value"], rows(findings)["fora"]["speedup"]) == (3, 1.8)
    assert rows(findings)["uniform_cache"]["speedup"] == 1.8
    none = searched(dit_pipeline(), "fora", budget=3)
    assert none.best is None
    assert reasons(none) == {"fora": "it makes denoising 2.25 times as fast at the most (interval 8)"}
    assert none.facts["fewer"]["value"] == 2, "fewer steps stand there all the same"


def test_a_knob_that_was_set_stays(found: Any) -> None:
    findings = searched(dit_pipeline(), "fora", "uniform_cache", overrides=["fora.interval=6", "uniform_cache.first=2"])
    assert rows(findings)["fora"]["speedup"] == 2.25
    assert rows(findings)["uniform_cache"]["step"]["uniform_cache"].items() >= {"ratio": 0.45, "first": 2}.items()
    slow = searched(dit_pipeline(), "uniform_cache", overrides=["uniform_cache.ratio=0.2"])
    assert reasons(slow) == {"uniform_cache": "it makes denoising 1.12 times as fast at the most (ratio 0.2)"}


def test_errors_are_those_of_replays(found: Any) -> None:
    """An independent way to the same latents: the recorded generation, replayed outside of the pipeline."""
    _, findings, _ = found
    network = open_model(dit_pipeline())
    runs = replays(network, Trajectories.of(network, record(network.processor, network.module, WANTED, findings.facts["held_out_seed"])))

    def along() -> list[list[Tensor]]:
        made = []
        for run in runs:
            state, passed = run.start(), []
            for _ in run.calls:
                state = run.advance(state, output_of(network.run(run.call(state))))
                passed.append(state.x_BCHW)
            made.append(passed)
        return made

    def apart(made: list[list[Tensor]], step: int) -> float:
        squares = [(a[step] - b[step]).square().flatten() for a, b in zip(made, exact, strict=True)]
        return float(torch.cat(squares).mean())

    exact = along()
    with aerogel.cached(network, {"steps": [{"fora": {}}]}, samples=WANTED):
        made = along()
    row = rows(findings)["fora"]
    assert row["step_errors"] == pytest.approx([apart(made, step) for step in range(6)], rel=1e-2, abs=1e-9)
    assert row["step_errors"][0] == 0 < row["error"] == row["step_errors"][-1]
    assert findings.facts["variance"] == pytest.approx(float(torch.cat([one[-1].flatten() for one in exact]).var()), rel=1e-2)

    fewer = findings.facts["fewer"]
    assert (fewer["value"], fewer["speedup"]) == (4, 1.5)
    runs = replays(
        network,
        Trajectories.of(network, record(network.processor, network.module, replace(WANTED, steps=4), findings.facts["held_out_seed"])),
    )
    assert fewer["error"] == pytest.approx(apart(along(), -1), rel=1e-2)


def test_noise_of_the_judgement_is_not_that_of_the_calibration(found: Any) -> None:
    facts = found[1].facts
    assert facts["held_out_seed"] != facts["provenance"]["seed"]


def test_the_table_says_what_ran(found: Any) -> None:
    made = rows(found[1])
    assert made["fora"]["ran"] == EVERY_SECOND
    computed_T = spread(6, 0.45, 1)
    assert made["uniform_cache"]["ran"] == [[float(one)] * 2 for one in computed_T]
    assert found[1].facts["modules"] == ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    assert found[1].facts["steps"] == [float(step) for step in _timesteps(6)]


def _timesteps(steps: int) -> Any:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def test_pictures_are_of_equal_seeds(found: Any) -> None:
    _, findings, _ = found
    pipeline, facts = dit_pipeline(), findings.facts

    def generated(wanted: Denoising = WANTED) -> list[str]:
        made = generate_images(pipeline, wanted, facts["held_out_seed"])
        return [png(image_CHW) for batch in made for image_CHW in batch.images_NCHW]

    assert facts["images"] == generated()
    assert facts["fewer"]["images"] == generated(replace(WANTED, steps=4))
    with aerogel.cached(pipeline, {"steps": [{"fora": {}}]}, samples=WANTED):
        assert rows(findings)["fora"]["images"] == generated()
    assert facts["subjects"] == ["cat", "dog", "cat"]


def test_the_best_is_the_one_of_least_error_and_its_folder_puts_it_on(found: Any) -> None:
    _, findings, folder = found
    errors = [row["error"] for row in findings.facts["rows"]]
    assert errors == sorted(errors)
    assert findings.best.step.name == findings.facts["rows"][0]["policy"]
    assert {path.name for path in folder.iterdir()} == {"aerogel.json", "search.json", "report.html"}, "no weights"
    assert json.loads((folder / "search.json").read_text()) == json.loads(json.dumps(findings.facts))
    pipeline = dit_pipeline()
    options = {"class_labels": [0, 7], "num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}

    def paint() -> Tensor:
        return torch.as_tensor(pipeline(generator=torch.Generator().manual_seed(1), **options).images)

    before = paint()
    with aerogel.cached(pipeline, folder) as on:
        inside = paint()
    assert on[0].step == findings.best.step
    with aerogel.cached(pipeline, {"steps": [findings.best.step.as_dict()]}, samples=WANTED):
        assert torch.equal(paint(), inside)
    assert not torch.equal(inside, before)


def test_states_with_tensors_are_saved_too(tmp_path: Path) -> None:
    findings = searched(dit_pipeline(), "smoothcache", budget=1.2)
    findings.save(tmp_path / "out")
    assert (tmp_path / "out" / "aerogel/policies.safetensors").is_file()
    with aerogel.cached(dit_pipeline(), tmp_path / "out") as on:
        assert torch.equal(on[0].state.changes["feed-forward.change"], findings.best.state.changes["feed-forward.change"])
    with pytest.raises(AerogelError, match="not empty"):
        findings.save(tmp_path / "out")


def test_what_goes_on_comes_off() -> None:
    pipeline = dit_pipeline()
    clock = Ticks(open_model(pipeline))
    own = {name: module.__dict__.get("forward") for name, module in pipeline.transformer.named_modules()}
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    hooks = len(pipeline.transformer._forward_pre_hooks)
    searched(pipeline, "fora", "first_block", clock=clock)
    assert {name: module.__dict__.get("forward") for name, module in pipeline.transformer.named_modules()} == own
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.transformer.state_dict().items())
    assert "step" not in pipeline.scheduler.__dict__
    assert (len(pipeline.transformer._forward_pre_hooks), len(pipeline.transformer._forward_hooks)) == (hooks, 0)


def test_noise_that_a_sampler_draws_is_no_error() -> None:
    """A replay refuses such a sampler; here it draws the same each time."""
    pipeline = dit_pipeline()
    pipeline.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    findings = searched(pipeline, "fora", overrides=["fora.interval=2"])
    assert rows(findings)["fora"]["step_errors"][0] == 0 < rows(findings)["fora"]["error"]
    assert rows(findings)["fora"]["error"] < findings.facts["variance"]


def test_progress_is_told() -> None:
    told: list[Event] = []
    searched(dit_pipeline(), "fora", "uniform_cache", tell=told.append)
    assert [event.what for event in told if event.stage == "compress"] == ["", "fora", "uniform_cache", "fewer steps"]
    assert [event.what for event in told if event.stage == "evaluate"] == ["", "the whole denoiser", "fora", "uniform_cache", "fewer steps"]


@dataclass(frozen=True)
class Toy(BudgetedCachePolicy[ScheduleState]):
    """Takes a target."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        if (self.target_speedup or 0) > 2.5:
            raise AerogelError("cannot be had")
        return schedule_state(network, Trajectories.of(network, calls), lambda steps, modules: torch.ones(steps, modules, dtype=torch.bool))


@dataclass(frozen=True)
class Plain(SchedulePolicy[ScheduleState]):
    """Has nothing to turn."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        raise AssertionError("is not tried")


def attempt(cls: type[FeatureCachePolicy[Any]], *speeds: float, **options: Any) -> Attempt:
    """An attempt whose measured speeds are these, one after the other."""
    network = open_model(dit_pipeline())
    pace = SpeedBudget(network, WANTED, 1.5, 0, 1, Ticks(network))
    left = iter(speeds)
    pace.speedup = lambda on: next(left)  # type: ignore[method-assign,assignment,misc]
    made = Attempt(Candidate("toy", cls, options), record(network.processor, network.module, WANTED), pace, 0)
    made.run()
    return made


def test_a_target_is_asked_for_again_until_the_measured_speed_fits() -> None:
    short = attempt(Toy, 1.3, 1.55)
    assert [one.value for one in short.tries] == [1.5, 1.8333], "0.5 more than 1 gave 0.3: ask for 0.5 / 0.3 as much"
    assert short.brought is not None
    assert short.brought.at.speedup == 1.55
    far = attempt(Toy, 2.0, 1.4, 1.52)
    assert [one.value for one in far.tries] == [1.5, 1.25, 1.3125]
    assert far.brought is not None
    assert far.brought.at.speedup == 1.52, "the slowest that is fast enough"
    assert attempt(Toy, 1.48).brought is not None, "2 % are within what measured times tremble by"


def test_a_target_that_cannot_be_had_is_told() -> None:
    refused = attempt(Toy, 1.2, 1.3, target_speedup=3.0)
    assert (refused.brought, refused.reason) == (None, "cannot be had")
    slow = attempt(Toy, 1.1, 1.2)
    assert slow.brought is None
    assert slow.reason == "it makes denoising 1.10 times as fast at the most (target_speedup 1.5)"
    assert [one.value for one in attempt(Toy, 1.6, ratio=0.4).tries] == [0.4], "what was said is not turned"


def test_who_has_nothing_to_turn_is_left_out() -> None:
    assert attempt(Plain).reason.startswith("it names no option that makes it faster")


def test_every_policy_of_ours_is_a_candidate() -> None:
    names = {one.name for one in candidates()}
    assert {"fora", "uniform_cache", "smoothcache", "taylorseer", "pab", "schedule_search", "harmonica", "first_block", "teacache"} <= names
    assert not {"gptq", "attention_quant"} & names


@pytest.mark.parametrize(("name", "option"), [(one.name, one.cls.search_space[0]) for one in candidates() if one.cls.search_space])
def test_strengths_are_values_of_a_knob(name: str, option: str) -> None:
    (candidate,) = candidates([name])
    assert candidate.option == option
    assert list(candidate.values) == sorted(set(candidate.values))
    for value in candidate.values:
        assert getattr(candidate.step(value).method, option) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "words"}, "'words' is nothing that can be searched for; known are cache, skip, tokens"),
        ({"budget": "fast"}, "budget 'fast' is no speed-up; give how many times faster denoising has to be, for example 1.5x"),
        ({"budget": 1.0}, r"budget 1\.0 is no speed-up"),
        ({"rounds": 0}, "rounds is 0; it is at least 1"),
        ({"only": ["gptq"]}, "gptq does not reuse anything, so it is no cache to choose"),
        ({"only": ["fore"]}, "did you mean fora"),
        ({"overrides": ["fora.intervall=2"]}, "policy 'fora': unknown option 'intervall'; did you mean interval"),
        ({"overrides": ["uniform_cache.ratio=0.2"]}, "an option of 'uniform_cache' is set, but that policy is not tried; known are fora"),
        ({"samples": [Call((), {})]}, "give a Denoising as samples, not recorded calls"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        search(dit_pipeline(), **{"only": ["fora"], "samples": WANTED, **options})


def test_models_that_cannot_be_searched_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="came without its pipeline and generates no images"):
        search(dit_pipeline().transformer, only=["fora"], samples=WANTED)
    with pytest.raises(AerogelError, match="this llama model came without its pipeline and generates no images"):
        search(FAMILIES["llama"].build())
    network = open_model(dit_pipeline())
    network.family = replace(network.family, cached_modules=())
    with pytest.raises(AerogelError, match="names no modules whose outputs could be cached"):
        search(network, samples=WANTED)
    aerogel.compress(dit_pipeline(), {"steps": [{"fora": {}}]}, samples=WANTED, output=tmp_path / "cached", measures=())
    with pytest.raises(AerogelError, match="has fora on already; give the pipeline that it was made for"):
        search(tmp_path / "cached", only=["fora"], samples=WANTED)
    with pytest.raises(AerogelError, match="this folder exists and is not empty"):
        search(dit_pipeline(), only=["fora"], samples=WANTED, output=tmp_path / "cached")


def test_findings_in_memory_report_where_they_are_told(tmp_path: Path) -> None:
    findings = searched(dit_pipeline(), "fora")
    with pytest.raises(AerogelError, match="are in memory only"):
        findings.report()
    assert "fora" in findings.report(tmp_path / "r.html").read_text()
    assert findings.best is not None
    assert findings.best.step.method == Fora(interval=2)


def test_every_policy_has_a_row_or_a_reason() -> None:
    """Also those that learn, of which the target is met in real seconds of modules: whether they are fast enough is not asked here."""
    few = ["harmonica.trajectories=1", "l2c.iterations=1", "schedule_search.trials=3", "schedule_search.samples=2"]
    findings = searched(dit_pipeline(), overrides=few)
    assert sorted([*rows(findings), *reasons(findings)]) == sorted(one.name for one in candidates())
    assert all(reasons(findings).values())
