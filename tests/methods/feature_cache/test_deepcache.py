"""DeepCache: which steps run all blocks, written out and beside what the authors' code gives, and a pipeline under it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.deepcache import Deepcache, gathered
from tests import image_pipelines
from tests.runtime.feature_cache.test_schedule import calls as generation
from tests.runtime.feature_cache.test_skip_connections import calls, literal, made
from tests.tiny import fill, opened, output

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

TEN = tuple(900.0 - 100 * place for place in range(10))


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, "1001001001"),
        ({"interval": 1}, "1111111111"),
        ({"interval": 2}, "1010101010"),
        ({"interval": 20}, "1000000000"),
        ({"center": 3}, "1001101000"),
        ({"center": 3, "power": 1.2}, "1001100100"),
        ({"interval": 2, "center": 0}, "1110100100"),
    ],
)
def test_these_steps_run_all_blocks(options: dict[str, Any], whole: str) -> None:
    given = calls("unet_pixels", steps=TEN)
    assert Deepcache(**options).calibrate(made("unet_pixels"), given).whole == whole


@pytest.mark.parametrize(
    ("steps", "count", "center", "power", "wanted"),
    [
        (50, 10, 15, 1.4, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        (50, 17, 15, 1.4, [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46]),
        (50, 5, 10, 1.2, [0, 9, 16, 26, 38]),
        (100, 10, 0, 3.0, [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]),
        (20, 7, 6, 1.4, [0, 3, 5, 7, 10, 13, 16]),
        (50, 25, 10, 1.2, [0, 2, 4, 6, 7, 9, 10, 11, 13, 15, 16, 18, 20, 22, 24, 26, 29, 31, 33, 35, 38, 40, 42, 45, 47]),
    ],
)
def test_steps_gather_around_a_center_as_in_the_authors_code(steps: int, count: int, center: int, power: float, wanted: list[int]) -> None:
    """What their `sample_from_quad_center` gives for these arguments."""
    assert gathered(steps, count, center, power) == wanted


def test_options_out_of_range_and_other_denoisers_are_refused() -> None:
    network, given = made("unet"), calls("unet", steps=TEN)
    with pytest.raises(AerogelError, match="option 'interval': expected a number from 1 to 1,000,000, got 0"):
        Deepcache(interval=0).calibrate(network, given)
    with pytest.raises(AerogelError, match="center 10 is none of the 10 steps, which are counted from 0"):
        Deepcache(center=10).calibrate(network, given)
    with pytest.raises(AerogelError, match="option 'power': expected a number above 1, got 1"):
        Deepcache(center=3, power=1).calibrate(network, given)
    with pytest.raises(AerogelError, match="keeps 5 of 10 steps apart around center 5; take a larger interval"):
        Deepcache(interval=2, center=5).calibrate(network, given)
    with pytest.raises(AerogelError, match="branch 4 is none of this denoiser's 4 skip connections"):
        Deepcache(branch=4).calibrate(network, given)
    with pytest.raises(AerogelError, match="the dit family names no skip connections"):
        Deepcache().calibrate(opened("dit"), generation("dit"))


def test_a_network_answers_by_its_state() -> None:
    network, given = made("stable"), calls("stable", steps=TEN)
    policy = Deepcache(interval=4, branch=2)
    state = policy.read(json.loads(json.dumps(policy.calibrate(network, given).as_dict())))
    assert state.steps == TEN
    assert state.blocks == len(network.blocks())
    wanted = literal(network, given, "1000100010", "up_blocks.2.resnets.0", 32)
    with policy.on(network, state):
        assert all(torch.equal(output(network.module, call), answer) for call, answer in zip(given, wanted, strict=True))


def paint(pipeline: Any) -> Tensor:
    made = pipeline(batch_size=2, num_inference_steps=7, generator=torch.Generator().manual_seed(9), output_type="np")
    return torch.as_tensor(made.images)


def test_a_pipeline_paints_what_hooks_paint() -> None:
    """Twice in a row; the hook gives the last up block what it got two steps in three, beside the skip."""
    network = open_model(image_pipelines.unconditional())
    fill(network.module, torch.Generator().manual_seed(0))
    plain = paint(network.processor)
    kept: list[Tensor] = []
    rows = itertools.count()

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if next(rows) % 7 % 3 == 0:
            kept[:] = [args[0][:, :-32]]
        return (torch.cat([kept[0], args[0][:, -32:]], dim=1), *args[1:])

    hook = network.module.get_submodule("up_blocks.1.resnets.1").register_forward_pre_hook(enter)
    wanted = paint(network.processor)
    hook.remove()
    samples = record(network.processor, network.module, Denoising(count=2, steps=7, batch=2))
    with aerogel.cached(network, {"steps": [{"deepcache": {}}]}, samples=samples) as found:
        assert found[0].state.sampler == "DDIMScheduler"
        for _ in range(2):
            assert torch.equal(paint(network.processor), wanted)
    assert not torch.equal(plain, wanted)
    assert torch.equal(paint(network.processor), plain)
