"""The table of temporal features: codes recomputed by hand, exact where it holds what the path gives, off when it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.diffusion.time_table import TimeTable
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.methods.diffusion.test_fsc import RECIPE, STEPS, calls, given_by
from tests.tiny import FAMILIES, opened, output


def features(network: Network) -> dict[str, torch.Tensor]:
    path = time_path.find(network)
    sinusoid_TC = time_path.sinusoids(network, path, calls()[0], STEPS)
    with torch.no_grad():
        rows = [path.features(sinusoid_TC[row : row + 1]) for row in range(len(STEPS))]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def looked_up(network: Network, policy: TimeTable, state: dict[str, Any], call: Call) -> dict[str, torch.Tensor]:
    with policy.on(network, state):
        return {name: given_by(network, name, call) for name in time_path.find(network).projections}


def test_int8_rows_match_a_recomputation_by_hand() -> None:
    network = opened("unet")
    policy = TimeTable(dtype="int8")
    state = policy.calibrate(network, calls())
    for name, feature_TC in features(network).items():
        for row in range(len(STEPS)):
            values = feature_TC[row].double()
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
            wanted = (values / scale + zero).round().clamp(-128, 127)
            assert (state[name][row].double() - wanted).abs().max() <= 1, "ties in float32 may fall to the other side"
            assert (state[name][row].double() == wanted).double().mean() > 0.99
            back = (state[name][row].double() - int(state[f"{name}.zero_point"][row])) * float(state[f"{name}.scale"][row])
            assert (back - values).abs().max() <= scale * (1 + 1e-6)
            assert (back - values).abs().quantile(0.95) <= scale / 2 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_answers_come_from_the_row_of_the_step(dtype: Any) -> None:
    network = opened("unet")
    policy = TimeTable(dtype=dtype)
    state = policy.calibrate(network, calls())
    wanted = features(network)
    mixed = Call((), calls(2)[0].kwargs | {"timestep": torch.tensor([STEPS[2], STEPS[0]])})
    for call, rows in [*((call, [row] * 2) for row, call in enumerate(calls(2))), (mixed, [2, 0])]:
        for name, feature in looked_up(network, policy, state, call).items():
            bound = 1e-3 * wanted[name].abs().max() if dtype == "float16" else state[f"{name}.scale"].max()
            assert (feature - wanted[name][rows]).abs().max() <= bound


def test_a_table_of_the_path_gives_the_same_images_to_the_last_bit() -> None:
    network = aerogel.compress(FAMILIES["unet"].build(), RECIPE, samples=calls(), measures=()).network
    before = [output(network.module, call) for call in calls(4)]
    policy = TimeTable(content="path")
    with policy.on(network, policy.calibrate(network, calls())):
        assert all(torch.equal(output(network.module, call), old) for call, old in zip(calls(4), before, strict=True))


def test_it_comes_off() -> None:
    network, policy = opened("unet"), TimeTable(dtype="int8")
    before = [output(network.module, call) for call in calls()]
    state = policy.calibrate(network, calls())
    with policy.on(network, state):
        assert not all(torch.equal(output(network.module, call), old) for call, old in zip(calls(), before, strict=True))
    assert all(torch.equal(output(network.module, call), old) for call, old in zip(calls(), before, strict=True))
    assert not any("forward" in module.__dict__ for module in network.module.modules())


def test_another_step_is_refused() -> None:
    network, policy = opened("unet"), TimeTable()
    with policy.on(network, policy.calibrate(network, calls())), pytest.raises(AerogelError, match="time step 981"):
        network.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(981)}))


def test_float_features_cannot_be_had_from_a_quantized_path() -> None:
    recipe = {"steps": [*RECIPE["steps"], {"time_table": {}}]}  # type: ignore[misc]
    with pytest.raises(AerogelError, match="put time_table before the steps that quantize"):
        aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=())


def test_later_steps_see_the_table_and_the_folder_keeps_it(tmp_path: Path) -> None:
    recipe = {"steps": [{"time_table": {"dtype": "int8"}}, {"rtn": {"scheme": "W8A16_CHANNEL", "ignore": ["*time_emb*"]}}]}
    aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=(), output=tmp_path / "out")
    network = aerogel.load(tmp_path / "out")
    plain = opened("unet")
    state = TimeTable(dtype="int8").calibrate(plain, calls())
    name, wanted = next(iter(features(plain).items()))
    assert (given_by(network, name, calls()[1])[0] - wanted[1]).abs().max() <= state[f"{name}.scale"].max()
    with pytest.raises(AerogelError, match="time step 981"):
        network.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(981)}))
