"""The table of temporal features: codes recomputed by hand, exact where it holds what the path gives, off when it is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.linear import timestep_index_of
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.methods.diffusion.temporal_cache import TemporalCache, TemporalCacheState, chosen, looked_up_features
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.methods.diffusion.test_fsc import RECIPE, STEPS, calls, given_by
from tests.tiny import FAMILIES, opened, output


def features(network: Network) -> dict[str, torch.Tensor]:
    path = time_path.find(network)
    sinusoid_TC = time_path.sinusoids(network, path, calls()[0], STEPS)
    clock = timestep_index_of(network.module) or TimestepIndex(STEPS)
    rows = []
    for row in range(len(STEPS)):
        with torch.no_grad(), clock.at((row,)):
            rows.append(path.features(sinusoid_TC[row : row + 1]))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def taught() -> Network:
    """A network that is its own teacher, as at the start of a run."""
    network = opened("unet")
    network.teacher = network
    return network


def looked_up(network: Network, policy: TemporalCache, state: TemporalCacheState, call: Call) -> dict[str, torch.Tensor]:
    with policy.on(network, state):
        return {name: given_by(network, name, call) for name in time_path.find(network).projections}


def test_int8_rows_match_a_recomputation_by_hand() -> None:
    network = taught()
    policy = TemporalCache(dtype="int8")
    tables = policy.calibrate(network, calls()).tables
    for name, feature_TC in features(network).items():
        for row in range(len(STEPS)):
            values = feature_TC[row].double()
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
            wanted = (values / scale + zero).round().clamp(-128, 127)
            assert (tables[name][row].double() - wanted).abs().max() <= 1, "ties in float32 may fall to the other side"
            assert (tables[name][row].double() == wanted).double().mean() > 0.99
            back = (tables[name][row].double() - int(tables[f"{name}.zero_point"][row])) * float(tables[f"{name}.scale"][row])
            assert (back - values).abs().max() <= scale * (1 + 1e-6)
            assert (back - values).abs().quantile(0.95) <= scale / 2 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_answers_come_from_the_row_of_the_step(dtype: Any) -> None:
    network = taught()
    policy = TemporalCache(dtype=dtype)
    state = policy.calibrate(network, calls())
    wanted = features(network)
    mixed = Call((), calls(2)[0].kwargs | {"timestep": torch.tensor([STEPS[2], STEPS[0]])})
    for call, rows in [*((call, [row] * 2) for row, call in enumerate(calls(2))), (mixed, [2, 0])]:
        for name, feature in looked_up(network, policy, state, call).items():
            bound = 1e-3 * wanted[name].abs().max() if dtype == "float16" else state.tables[f"{name}.scale"].max()
            assert (feature - wanted[name][rows]).abs().max() <= bound


def test_a_table_of_the_path_gives_the_same_images_to_the_last_bit() -> None:
    network = aerogel.compress(FAMILIES["unet"].build(), RECIPE, samples=calls(), measures=()).network
    before = [output(network.module, call) for call in calls(4)]
    policy = TemporalCache(content="path")
    with policy.on(network, policy.calibrate(network, calls())):
        assert all(torch.equal(output(network.module, call), old) for call, old in zip(calls(4), before, strict=True))


def test_it_comes_off() -> None:
    network, policy = taught(), TemporalCache(dtype="int8")
    before = [output(network.module, call) for call in calls()]
    state = policy.calibrate(network, calls())
    with policy.on(network, state):
        assert not all(torch.equal(output(network.module, call), old) for call, old in zip(calls(), before, strict=True))
    assert all(torch.equal(output(network.module, call), old) for call, old in zip(calls(), before, strict=True))
    assert not any("forward" in module.__dict__ for module in network.module.modules())


def test_a_state_without_a_table_is_refused_by_name() -> None:
    network, policy = taught(), TemporalCache()
    state = policy.calibrate(network, calls())
    lost = min(key for key in state.tables if key.endswith(".chosen"))
    state = dataclasses.replace(state, tables={key: value for key, value in state.tables.items() if key != lost})
    with pytest.raises(AerogelError, match=f"no field '{lost}'; calibrate the policy anew"), policy.on(network, state):
        pass


def test_another_step_is_refused() -> None:
    network, policy = taught(), TemporalCache()
    with policy.on(network, policy.calibrate(network, calls())), pytest.raises(AerogelError, match="time step 981"):
        network.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(981)}))


def test_float_features_are_those_before_any_step() -> None:
    recipe = {"steps": [*RECIPE["steps"], {"temporal_cache": {"dtype": "float16"}}]}  # type: ignore[misc]
    result = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=())
    (measured,) = result.policies
    for name, feature in features(opened("unet")).items():
        torch.testing.assert_close(measured.state.tables[name], feature.half())
    assert result.network.teacher is None


def selected(bits: int, dtype: str, choose: str) -> Mapping[str, torch.Tensor]:
    """The tables after the path was rounded to nearest."""
    path = {"tiar": {"scheme": f"W{bits}A16_CHANNEL_ASYM", "steps": 0}}
    recipe = {"steps": [path, {"fsc": {}}, {"temporal_cache": {"dtype": dtype, "choose": choose}}]}
    (measured,) = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=()).policies
    return measured.state.tables


def total(state: Mapping[str, torch.Tensor]) -> float:
    """The error of what is chosen, over all projections and steps."""
    names = [name.removesuffix(".chosen") for name in state if name.endswith("time_emb_proj.chosen")]
    parts = [torch.where(state[f"{name}.chosen"], state[f"{name}.table_error"], state[f"{name}.path_error"]) for name in names]
    return float(torch.stack([part.sum() for part in parts]).sum())


@pytest.mark.parametrize("dtype", ["int5", "int6"])
def test_a_finer_choice_is_never_worse(dtype: str) -> None:
    by_step, by_layer, everywhere = (selected(4, dtype, choose) for choose in ("layer_step", "layer", "all"))
    names = [name.removesuffix(".chosen") for name in everywhere if name.endswith("time_emb_proj.chosen")]
    path = sum(float(everywhere[f"{name}.path_error"].sum()) for name in names)
    assert total(by_step) <= total(by_layer) * (1 + 1e-6)
    assert total(by_layer) <= min(path, total(everywhere)) * (1 + 1e-6)


@pytest.mark.parametrize(("bits", "dtype", "share"), [(4, "int8", 1.0), (8, "int4", 0.0)])
def test_the_extremes_of_the_choice(bits: int, dtype: str, share: float) -> None:
    state = selected(bits, dtype, "layer")
    rows = torch.cat([value for name, value in state.items() if name.endswith("time_emb_proj.chosen")])
    assert float(rows.float().mean()) == share


def test_errors_are_squared_distances_and_ties_go_to_the_table() -> None:
    state = selected(4, "int6", "layer_step")
    wanted = features(opened("unet"))
    name = next(iter(time_path.find(opened("unet")).projections))
    table = (state[name].float() - state[f"{name}.zero_point"].float()) * state[f"{name}.scale"]
    for row in range(len(STEPS)):
        by_hand = sum((float(a) - float(b)) ** 2 for a, b in zip(table[row], wanted[name][row], strict=True))
        assert float(state[f"{name}.table_error"][row]) == pytest.approx(by_hand, rel=1e-3)
    one = torch.ones(3)
    assert chosen(one, one, "layer").all()
    assert chosen(one, one, "layer_step").all()
    assert chosen(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), "layer_step").tolist() == [True, False]
    assert chosen(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), "layer").tolist() == [False, False]


def test_steps_of_one_layer_come_from_both_places() -> None:
    recipe = {"steps": [*RECIPE["steps"], {"temporal_cache": {"dtype": "int6", "choose": "layer_step"}}]}  # type: ignore[misc]
    result = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=())
    (measured,) = result.policies
    name = next(iter(time_path.find(result.network).projections))
    turns = {f"{name}.chosen": torch.tensor([True, False, True, False])}
    state = replace(measured.state, tables={**measured.state.tables, **turns})
    policy = measured.step.method
    assert isinstance(policy, TemporalCache)
    own = features(result.network)[name]
    table = looked_up_features(state.tables, name)
    mixed = Call((), calls(2)[0].kwargs | {"timestep": torch.tensor([STEPS[0], STEPS[1]])})
    with policy.on(result.network, state):
        assert torch.equal(given_by(result.network, name, calls(2)[0])[0], table[0])
        assert torch.equal(given_by(result.network, name, calls(2)[1])[0], own[1])
        both = given_by(result.network, name, mixed)
    assert torch.equal(both[0], table[0])
    torch.testing.assert_close(both[1], own[1], rtol=1e-4, atol=1e-5)


def test_later_steps_see_the_table_and_the_folder_keeps_it(tmp_path: Path) -> None:
    recipe = {"steps": [{"temporal_cache": {"dtype": "int8"}}, {"rtn": {"scheme": "W8A16_CHANNEL", "ignore": ["*time_emb*"]}}]}
    aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=(), output=tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1, (
        "whoever may read one file may read all"
    )
    network = aerogel.load(tmp_path / "out")
    plain = taught()
    state = TemporalCache(dtype="int8").calibrate(plain, calls())
    name, wanted = next(iter(features(plain).items()))
    assert (given_by(network, name, calls()[1])[0] - wanted[1]).abs().max() <= state.tables[f"{name}.scale"].max()
    with pytest.raises(AerogelError, match="time step 981"):
        network.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(981)}))
