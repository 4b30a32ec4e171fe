"""Ranges measured anew: those of the generation that the compressed network makes, under what is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine import policies
from aerogel.engine.estimates import needs_teacher
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.methods.diffusion.recalibrate import Recalibrate, set_ranges
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.quantize import Grid
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.replay import output_of, replays
from tests import image_pipelines
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

QUANTIZED: list[dict[str, Any]] = [
    {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear"]}},
    {"activation_ranges": {"start": "minmax", "steps": 0, "targets": ["Linear"]}},
]
LAYER = "transformer_blocks.0.ff.net.2"


def compressed(*steps: dict[str, Any]) -> tuple[Any, list[Any]]:
    network = dit_pipeline()
    calls = recorded(network)
    return aerogel.compress(network, {"steps": [*QUANTIZED, *steps]}, samples=calls, measures=()), calls


def grid(network: Network) -> Grid:
    found = network.module.get_submodule(LAYER).input_grid()  # type: ignore[operator]
    assert found is not None
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("fora", [None, {"fora": {"interval": 2}}])
def test_ranges_are_those_of_the_generation_under_the_cache(fora: dict[str, Any] | None) -> None:
    made, calls = compressed(*([fora] if fora else []))
    anew, _ = compressed(*([fora] if fora else []), {"recalibrate": {"momentum": 0.5}})
    low: list[float] = []
    high: list[float] = []

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        low.append(float(args[0].min()))
        high.append(float(args[0].max()))

    teacher = dit_pipeline()
    network = made.network
    network.processor.scheduler = teacher.processor.scheduler
    hook = network.module.get_submodule(LAYER).register_forward_pre_hook(see)
    with policies.on(network, made.policies):
        for run in replays(teacher, Trajectories.of(teacher, calls)):
            run.finish(run.start(), lambda _, call: output_of(network.run(call)))
    hook.remove()
    assert len(low) == (6 if fora else 10), "two generations of five steps; a layer that rests is not seen"
    lowest, highest = low[0], high[0]
    for one, other in zip(low[1:], high[1:], strict=True):
        lowest, highest = 0.5 * lowest + 0.5 * one, 0.5 * highest + 0.5 * other
    step = (max(highest, 0) - min(lowest, 0)) / 255
    assert float(grid(anew.network).scale) == pytest.approx(step, rel=1e-5)
    assert float(grid(anew.network).scale) != pytest.approx(float(grid(network).scale), rel=1e-3)


def test_steps_at_which_a_layer_rests_keep_their_ranges() -> None:
    network = aerogel.load(image_pipelines.unconditional())
    calls = recorded(network, guidance=None, count=2)
    steps = [{"tiar": {"scheme": "W8A16_CHANNEL", "steps": 0}}, {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Conv2d"]}}]
    aerogel.compress(network, {"steps": [*steps, {"fsc": {"scope": "all"}}]}, samples=calls, measures=())
    name, layer = next((name, part) for name, part in network.module.named_modules() if isinstance(part, QuantLinear))
    before = layer.stored().input_grid
    assert before is not None
    assert before.zero is not None
    set_ranges(network, name, layer, {2: Grid(torch.tensor(0.25), torch.tensor(7))})
    after = network.module.get_submodule(name).stored().input_grid  # type: ignore[operator]
    others = [row for row in range(len(before.scale)) if row != 2]
    assert float(after.scale[2]) == 0.25
    assert int(after.zero[2]) == 7
    assert torch.equal(after.scale[others], before.scale[others])
    assert torch.equal(after.zero[others], before.zero[others])


def test_a_folder_and_a_live_pipeline_get_the_same_ranges(tmp_path: Path) -> None:
    """From a folder blocks come in and go again, the float network's too."""
    recipe = {"steps": [*QUANTIZED, {"fora": {"interval": 2}}, {"recalibrate": {}}]}
    wanted = Denoising(count=2, steps=4, batch=2)
    dit_pipeline().processor.save_pretrained(tmp_path / "in")
    lazy = aerogel.compress(tmp_path / "in", recipe, samples=wanted, output=tmp_path / "out", measures=())
    live, before = (
        aerogel.compress(aerogel.load(tmp_path / "in", lazy=False), {"steps": steps}, samples=wanted, measures=())
        for steps in (recipe["steps"], recipe["steps"][:-1])
    )
    assert torch.equal(grid(lazy.network).scale, grid(live.network).scale)
    assert not torch.equal(grid(live.network).scale, grid(before.network).scale)


def test_a_network_without_static_inputs_is_refused() -> None:
    network = dit_pipeline()
    with pytest.raises(AerogelError, match="put activation_ranges or fsc before recalibrate"):
        Recalibrate().apply(network, recorded(network))


def test_it_may_come_behind_a_cache_and_others_may_not() -> None:
    network, some = dit_pipeline(), Denoising(count=2, steps=4, batch=2)
    assert not plan(network, {"steps": [*QUANTIZED, {"fora": {}}, {"recalibrate": {}}]}, samples=some).problems
    (problem,) = plan(network, {"steps": [{"fora": {}}, *QUANTIZED[:1]]}, samples=some).problems
    assert "rtn comes after fora" in problem


@pytest.mark.parametrize(
    ("steps", "needed"),
    [
        ([{"harmonica": {"ratio": 0.4}}], False),
        ([*QUANTIZED[:1], {"harmonica": {"ratio": 0.4}}], True),
        ([{"harmonica": {"ratio": 0.4}}, {"recalibrate": {}}], True),
        (QUANTIZED, True),
        (QUANTIZED[:1], False),
    ],
)
def test_a_teacher_is_kept_where_somebody_asks_for_what_has_changed(steps: list[dict[str, Any]], needed: bool) -> None:
    assert needs_teacher(Recipe.parse({"steps": steps})) == needed


@pytest.mark.parametrize(
    "method", [{"schedule_search": {"ratio": 0.4, "trials": 40}}, {"harmonica": {"ratio": 0.4, "trajectories": 2, "samples": 2}}]
)
def test_a_cache_of_a_quantized_network_is_held_against_the_float_one(method: dict[str, Any]) -> None:
    coarse = [{"rtn": {"scheme": "W2A16_CHANNEL", "targets": ["Linear"]}}]
    for steps, apart in ((coarse, True), ([], False)):
        network = dit_pipeline()
        result = aerogel.compress(network, {"steps": [*steps, method]}, samples=recorded(network), measures=())
        state = result.policies[0].state
        assert (state.error_without_reuse > 1e-4) == apart
        assert state.error > 0
        assert network.teacher is None
