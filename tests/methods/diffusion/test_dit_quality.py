"""The trained Fashion DiT: the judge sees what was asked for, a scale a token beats one range, learned rounding beats the nearest."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising, generate_images, record
from aerogel.evaluate import features
from aerogel.model.calls import Call

pytestmark = pytest.mark.quality

ZOO = Path(__file__).parents[3] / "zoo"
WANTED = Denoising(count=10, steps=20, guidance=1.5, batch=10)


@cache
def pipeline() -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(ZOO / "fashion-dit", dtype=torch.float32)


@cache
def calls() -> list[Call]:
    return record(pipeline(), pipeline().transformer, WANTED)


def images(transformer: nn.Module, wanted: Denoising = WANTED) -> Tensor:
    """Images of other noise than that of the calls."""
    made = copy.copy(pipeline())
    made.transformer = transformer
    return torch.cat([some.images_NCHW for some in generate_images(made, wanted, seed=1)])


@cache
def error(*steps: str) -> float:
    """Mean squared error of the images of the same noise after a recipe of (method, scheme) pairs in one text each."""
    recipe = [RECIPES[step] for step in steps]
    network = aerogel.compress(copy.deepcopy(pipeline().transformer), {"steps": recipe}, samples=calls(), measures=()).network
    return float((images(network.module) - images(pipeline().transformer)).square().mean())


RECIPES: dict[str, dict[str, Any]] = {
    "weights in 8 bits": {"rtn": {"scheme": "W8A16_CHANNEL"}},
    "one range": {"activation_ranges": {"start": "minmax", "steps": 0}},
    "W8A8, a scale a token": {"rtn": {"scheme": "W8A8"}},
    "W4A8, a scale a token": {"rtn": {"scheme": "W4A8"}},
    "W4A8, a scale a token, learned": {"brecq": {"scheme": "W4A8", "targets": ["Linear"], "steps": 60, "rate": 0.03}},
}


def test_the_judge_sees_what_was_asked_for() -> None:
    made = images(pipeline().transformer, Denoising(count=60, steps=20, guidance=1.5, batch=30))
    judge = features.load(str(ZOO / "fashion-judge"), torch.device("cpu"))
    seen = judge.look(made).logits_NK.argmax(-1)
    assert float((seen == torch.arange(60) % 10).float().mean()) >= 0.9


@pytest.mark.slow
def test_a_scale_for_each_token_is_better_than_one_range() -> None:
    assert error("W8A8, a scale a token") < error("weights in 8 bits", "one range")


@pytest.mark.slow
def test_learned_rounding_is_better_than_the_nearest() -> None:
    assert error("W4A8, a scale a token, learned") < error("W4A8, a scale a token") / 1.5
