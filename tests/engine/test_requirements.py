"""Refusals before any work: what a step requires of the model, and options that do not suit it, are told by the plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import aerogel
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from tests.tiny import FAMILIES

STEPS = 5


def problems(name: str, *steps: dict[str, Any]) -> tuple[str, ...]:
    """The problems of a plan for a tiny model, of `STEPS` steps where it is a denoiser, or for a pipeline around it."""
    family, _, sampled = name.partition(" ")
    model: Any = FAMILIES[family].build()
    if sampled:
        model = (model, SimpleNamespace(scheduler=diffusers.DDIMScheduler()))
    return plan(model, {"steps": list(steps)}, samples=calls(family), flops_a_second=lambda: 1e9).problems


def calls(name: str) -> list[Call]:
    given = FAMILIES[name].calls(1)
    if "timestep" not in given[0].kwargs:
        return given
    return [
        Call((), given[0].kwargs | {"timestep": torch.full_like(given[0].kwargs["timestep"], 900 - 100 * step)}) for step in range(STEPS)
    ]


RTN = {"rtn": {"scheme": "W8A16_CHANNEL"}}
REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    # what the model lacks
    ("llama", [{"modes": {}}], "modes: this llama model has no routed experts; remove this step"),
    ("llama", [{"fora": {}}], "fora: the llama family names no"),
    ("llama", [{"first_block": {}}], "first_block: the llama family names no"),
    ("dit", [{"deepcache": {}}], "deepcache: the dit family names no skip connections"),
    ("llama", [{"tiar": {}}], "tiar: no layer of this llama model reads the time step and no image"),
    ("dit", [{"temporal_cache": {}}], "also depend on the class label"),
    ("llama", [{"split_shortcut": {}}], "no float layer of this llama model reads concatenated channels"),
    ("dit", [{"rotate": {}}], "rotate: cannot rotate: this dit model has no residual stream that a rotation passes"),
    ("dit", [{"split_shortcut": {}}], "no float layer of this dit model reads concatenated channels"),
    ("dit", [{"harmonica": {}}], "harmonica: the denoiser came without its pipeline"),
    ("sd3", [{"toca": {}}], "toca: transformer_blocks.0.attn attends to text and image together"),
    ("cogvideox", [{"duca": {}}], "text and image as one row of tokens, so cells of the image cannot be told; set cell to 1"),
    # the order of steps
    ("llama", [RTN, {"rotate": {}}], "is quantized by then; put rotate first"),
    ("dit", [{"fora": {}}, RTN], "rtn comes after fora, but needs a model of which every module runs; put fora last"),
    ("dit", [{"fora": {}}, {"pab": {}}], "pab comes after fora, and a model has one feature cache"),
    ("dit", [{"schedule_refine": {}}], "schedule_refine goes on from a schedule of reuse, and there is no policy before it"),
    ("unet", [{"fsc": {}}], "fsc: no layer of the temporal path is quantized: put tiar, or rtn on its layers, before fsc"),
    ("unet pipeline", [RTN, {"recalibrate": {}}], "recalibrate: no layer has inputs with static ranges"),
    ("unet", [{"activation_ranges": {}}], "activation_ranges reaches no quantized layer with float inputs"),
    # options
    ("mixtral", [{"reduced_topk": {"k": 3}}], "reduced_topk: k 3: this router chooses 2 experts"),
    ("mixtral", [{"reduced_topk": {"ratio": 0.6}}], "ratio 0.6 cannot be reached: this rule drops 0.500"),
    ("mixtral", [{"naee": {"ratio": 0.9}}], "naee: ratio 0.9 cannot be reached: this rule drops 0.500"),
    ("mixtral", [{"modes": {"ratio": 0.6, "keep_top1": True}}], "modes: ratio 0.6 cannot be reached: this rule drops 0.500"),
    ("mixtral", [{"odp": {"ratio": 0.9, "dropped": 0.0}}], "odp: ratio 0.9 cannot be reached: this rule drops 0.500"),
    ("mixtral", [{"prune_experts": {"ratio": 0.75}}], "leaves 1 of 4 experts, and tokens go to 2"),
    ("dit", [{"uniform_cache": {"ratio": 0.8, "first": 2}}], "a ratio of 0.8 means that 4 of 5 steps reuse"),
    ("dit", [{"first_block": {"first": 9}}], "first_block: first 9 and last 0 leave nothing"),
    ("unet", [{"deepcache": {"center": 5}}], "deepcache: center 5 is none of the 5 steps"),
    ("dit pipeline", [{"harmonica": {"ratio": 0.95}}], "harmonica: a ratio of 0.95 cannot be had"),
    ("dit pipeline", [{"harmonica": {"ratio": 0.6, "max_age": 1}}], "max_age 1"),
    ("dit pipeline", [{"l2c": {"ratio": 0.7}}], "l2c trains every second step only"),
    ("dit pipeline", [{"schedule_search": {}}], "schedule_search: give one of ratio"),
]


@pytest.mark.parametrize(("name", "steps", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_plan_refuses(name: str, steps: list[dict[str, Any]], message: str) -> None:
    assert any(message in problem for problem in problems(name, *steps))


SERVED: list[tuple[str, list[dict[str, Any]]]] = [
    ("llama", [{"rotate": {}}, {"smoothquant": {}}, {"gptq": {"scheme": "W4A16_G32"}}]),
    ("mixtral", [{"prune_experts": {"ratio": 0.25}}, {"reduced_topk": {"k": 1}}]),
    ("unet pipeline", [{"tiar": {}}, RTN, {"fsc": {}}, {"activation_ranges": {}}, {"recalibrate": {}}]),
    ("cogvideox", [{"toca": {"cell": 1}}]),
    ("flux", [{"split_shortcut": {}}]),
    ("unet", [{"temporal_cache": {}}, {"deepcache": {"center": 2}}]),
    ("dit pipeline", [RTN, {"attention_quant": {}}, {"harmonica": {"ratio": 0.5}}, {"schedule_refine": {}}]),
]


@pytest.mark.parametrize(("name", "steps"), SERVED, ids=str)
def test_a_plan_refuses_nothing_that_works(name: str, steps: list[dict[str, Any]]) -> None:
    assert problems(name, *steps) == ()


def test_no_work_is_started(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AerogelError, match="fora: the llama family names no"):
        aerogel.compress(
            model, {"steps": [{"gptq": {"scheme": "W4A16_G32"}}, {"fora": {}}]}, samples=calls("llama"), output=tmp_path / "out"
        )
    assert not any(tmp_path.iterdir())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_calls_that_do_not_serve_a_later_step_are_refused_before_the_first() -> None:
    model = FAMILIES["dit"].build()
    weight = next(part for part in model.modules() if isinstance(part, torch.nn.Linear)).weight.clone()
    with pytest.raises(AerogelError, match="fastercache: the recorded batch of 2 samples is not the same samples twice"):
        aerogel.compress(model, {"steps": [RTN, {"fastercache": {}}]}, samples=calls("dit"), measures=())
    assert torch.equal(next(part for part in model.modules() if isinstance(part, torch.nn.Linear)).weight, weight)


def test_seconds_follow_the_rate_that_is_given() -> None:
    slow, fast = (
        plan(FAMILIES["llama"].build(), {"steps": [RTN]}, samples=calls("llama"), flops_a_second=lambda rate=rate: rate).seconds["evaluate"]
        for rate in (1e9, 2e9)
    )
    assert slow == 2 * fast
