"""Static ranges: found as the formulas say, learned to something better, executed by integers, saved and opened again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel.engine import policies
from aerogel.errors import AerogelError
from aerogel.kernels import conv2d
from aerogel.layers.conv import QuantConv2d
from aerogel.layers.linear import QuantLinear
from aerogel.methods.diffusion.activation_ranges import INPUTS, power_error
from aerogel.model.network import Network
from aerogel.numerics.attention import OPERANDS
from aerogel.numerics.quantize import grid_from_range
from tests.kernels.exact_sums import needs_exact_sums
from tests.methods.diffusion.test_fsc import calls
from tests.tiny import FAMILIES, opened, output

ROUND = {"brecq": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 0}}


def compressed(options: dict[str, Any], *first: dict[str, Any], **settings: Any) -> Network:
    recipe = {"steps": [*(first or (ROUND,)), {"activation_ranges": options}]}
    return aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=(), **settings).network


def image_error(network: Network) -> float:
    plain = opened("unet")
    return sum(float((output(network.module, call) - output(plain.module, call)).square().mean()) for call in calls())


def test_the_error_has_its_exponent() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    wanted = sum(abs(float(x - y)) ** 2.4 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / 32
    assert float(power_error(a, b, 2.4)) == pytest.approx(wanted, rel=1e-5)


def test_extremes_of_all_calls() -> None:
    network = compressed({"start": "minmax", "steps": 0})
    plain = opened("unet")
    layer = plain.module.get_submodule("conv_in")
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for call in calls():
        output(plain.module, call)
    together = torch.cat(seen)
    grid = grid_from_range(together.min(), together.max(), INPUTS)
    twin = network.module.get_submodule("conv_in")
    assert isinstance(twin, QuantConv2d)
    found = twin.input_grid()
    assert found is not None
    assert float(found.scale) == pytest.approx(float(grid.scale), rel=1e-6)
    assert int(found.zero) == int(grid.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["minmax", "average", "search"])
def test_every_layer_gets_a_storable_range_and_images_stay_close(start: str) -> None:
    network = compressed({"start": start, "steps": 0})
    twins = [part for part in network.module.modules() if isinstance(part, QuantLinear)]
    assert len(twins) > 30
    for twin in twins:
        grid = twin.input_grid()
        assert grid is not None
        assert grid.scale > 0
        assert grid.zero is not None
        assert -128 <= int(grid.zero) <= 127
        assert str(twin.scheme) == "W8A8_ASYM_AFFINE"
    powers = sum(float(output(opened("unet").module, call).square().mean()) for call in calls())
    assert image_error(network) / powers < 0.02


@pytest.mark.slow
def test_learned_step_sizes_are_better() -> None:
    narrow = {"start": "average", "batch": 8}
    first = image_error(compressed(narrow | {"steps": 0}))
    learned = image_error(compressed(narrow | {"steps": 150, "rate": 0.02}))
    assert learned < first


def test_step_sizes_of_operands_are_learned_with_them() -> None:
    tiny = FAMILIES["dit"]
    plain = opened("dit")

    def made(steps: int) -> tuple[float, Mapping[str, torch.Tensor]]:
        recipe = {
            "steps": [
                {"rtn": {"scheme": "W8A16_CHANNEL"}},
                {"attention_quant": {"bits": 3, "probability_bits": 3}},
                {"activation_ranges": {"start": "average", "steps": steps, "rate": 0.02, "batch": 8}},
            ]
        }
        result = aerogel.compress(tiny.build(), recipe, samples=tiny.calls(3), measures=())
        with policies.on(result.network, result.policies):
            error = sum(float((output(result.network.module, call) - output(plain.module, call)).square().mean()) for call in tiny.calls(3))
        return error, result.policies[0].state.grids

    (first, before), (learned, after) = made(0), made(150)
    assert learned < first
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved == [key for key in before if key.rpartition(".")[2] in OPERANDS], "all step sizes, no zero point"
    assert not any(after[key].requires_grad for key in moved)


@needs_exact_sums
def test_integers_are_really_multiplied() -> None:
    network = compressed({"steps": 0})
    twin = network.module.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(twin, QuantConv2d)
    x = torch.randn(2, 64, 4, 4)
    assert conv2d.takes(twin, x)
    torch.testing.assert_close(conv2d.by_integers(x, twin, {}), conv2d.reference(x, twin), rtol=1e-4, atol=1e-4)


def test_per_step_ranges_of_the_path_stay(tmp_path: Path) -> None:
    steps = [
        {"tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 5}},
        ROUND,
        {"activation_ranges": {"steps": 5, "ignore": ["*time_emb*"]}},
        {"fsc": {}},
    ]
    options = {"samples": calls(), "measures": (), "output": tmp_path / "out"}
    network = aerogel.compress(FAMILIES["unet"].build(), {"steps": steps}, **options).network
    reopened = aerogel.load(tmp_path / "out")
    schemes = {str(part.scheme) for part in reopened.module.modules() if isinstance(part, QuantLinear)}
    assert len(schemes) == 2
    for call in calls():
        torch.testing.assert_close(output(reopened.module, call), output(network.module, call), rtol=1e-4, atol=1e-4)


def test_scales_of_steps_before_blocks_are_fitted_are_refused() -> None:
    steps = [{"tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 5}}, {"fsc": {}}, ROUND]
    with pytest.raises(AerogelError, match="put steps like fsc after those that fit blocks"):
        aerogel.compress(FAMILIES["unet"].build(), {"steps": steps}, samples=calls(), measures=())


def test_float_layers_are_left_alone() -> None:
    network = compressed({"steps": 0}, {"tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 5}})
    twins = [name for name, part in network.module.named_modules() if isinstance(part, QuantLinear)]
    assert all("time_emb" in name for name in twins)
