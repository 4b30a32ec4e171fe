"""Sense of time: figures are those of what forwards really use, with clocks and tables too; what cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.engine.scores import measure, measure_models
from aerogel.errors import AerogelError
from aerogel.evaluate.temporal import Temporal
from aerogel.model.network import Network
from tests.image_pipelines import classes, unconditional
from tests.methods.diffusion.test_fsc import given_by
from tests.tiny import opened

STEPS = 4
ROUGH = {"rtn": {"scheme": "W2A16_CHANNEL_ASYM", "targets": ["@time_path"]}}
RANGES: dict[str, Any] = {"fsc": {}}
# Coarse enough that some steps and blocks come from the table and some from the path.
TABLE = {"temporal_cache": {"dtype": "int4", "choose": "layer_step"}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "original"
    unconditional().save_pretrained(folder)
    return folder


def compressed(original: Path, output: Path, *steps: dict[str, Any]) -> Path:
    aerogel.compress(str(original), {"steps": list(steps)}, samples=Denoising(2, STEPS, batch=2), measures=(), output=output)
    return output


def used(network: Network) -> dict[str, torch.Tensor]:
    """What the projections give in whole forwards of the sampler's steps, (T, width) each in float64."""
    calls = record(network.processor, network.module, Denoising(1, STEPS, batch=1))
    names = [name for name, _ in network.module.named_modules() if name.endswith("time_emb_proj")]
    return {name: torch.cat([given_by(network, name, call) for call in calls]).double() for name in names}


@pytest.mark.parametrize(
    "steps", [(ROUGH,), (ROUGH, RANGES), (ROUGH, TABLE), (ROUGH, RANGES, TABLE)], ids=["path", "clock", "table", "both"]
)
def test_figures_are_those_of_what_forwards_use(original: Path, tmp_path: Path, steps: tuple[dict[str, Any], ...]) -> None:
    output = compressed(original, tmp_path / "out", *steps)
    found = measure_models(str(output), str(original), ["temporal"], lambda event: None, ["temporal.steps=4"])["compressed"]["temporal"]
    wanted, given = used(aerogel.load(original)), used(aerogel.load(output))  # with its policies on
    assert sorted(found["layers"]) == sorted(wanted)
    assert found["steps"] == [750, 500, 250, 0]
    error = size = wrong = 0.0
    for name, errors, cosines, mismatches in zip(found["layers"], found["errors"], found["cosines"], found["mismatches"], strict=True):
        for step in range(STEPS):
            exact, ours = wanted[name][step], given[name][step]
            apart = [float((other - ours).square().sum()) for other in wanted[name]]
            assert errors[step] == pytest.approx(apart[step] / float(exact.square().sum()), rel=1e-3, abs=1e-9)
            assert cosines[step] == pytest.approx(float(torch.cosine_similarity(exact, ours, 0)), abs=1e-6)
            assert mismatches[step] == (min(apart) < apart[step])
            error, size, wrong = error + apart[step], size + float(exact.square().sum()), wrong + mismatches[step]
    assert found["error"] == pytest.approx(error / size, rel=1e-3)
    assert found["error"] > 1e-5, "two bits leave a mark"
    assert found["mismatch"] == wrong / STEPS / len(wanted)
    recorded = json.loads((output / "aerogel.json").read_text())["metrics"]["compressed"]["temporal"]
    assert recorded == json.loads(json.dumps(found))


def test_blocks_come_in_the_order_of_a_forward(original: Path) -> None:
    network = aerogel.load(original)
    found = Temporal(steps=STEPS).measure(network, network)
    middle = next(place for place, name in enumerate(found["layers"]) if name.startswith("mid_block"))
    assert all(name.startswith("down_blocks") for name in found["layers"][:middle])
    assert found["layers"][-1].startswith("up_blocks")


def test_a_network_knows_its_own_time(original: Path) -> None:
    network = aerogel.load(original)
    found = Temporal(steps=STEPS).measure(network, network)
    assert (found["error"], found["mismatch"], found["sampler"]) == (0, 0, "DDIMScheduler")
    assert found["cosine"] == pytest.approx(1)


def test_a_table_is_looked_at_and_not_the_path_behind_it(original: Path, tmp_path: Path) -> None:
    found = {}
    for name, steps in {"path": (ROUGH,), "table": (ROUGH, {"temporal_cache": {}})}.items():
        output = compressed(original, tmp_path / name, *steps)
        scores = measure_models(str(output), str(original), ["temporal"], lambda event: None, ["temporal.steps=4"])
        found[name] = scores["compressed"]["temporal"]["error"]
    assert found["table"] < found["path"] / 1000, "half precision against two bits"


def test_steps_of_another_sampler_are_refused(original: Path, tmp_path: Path) -> None:
    output = compressed(original, tmp_path / "out", ROUGH, RANGES)
    with pytest.raises(AerogelError, match="is not among the 4 of DDIMScheduler"):
        measure_models(str(output), str(original), ["temporal"], lambda event: None, ["temporal.steps=3"])
    found = measure_models(str(output), str(original), ["temporal"], lambda event: None, ["temporal.steps=2"])["compressed"]["temporal"]
    assert found["steps"] == [500, 0], "some of its steps are steps it knows"


def test_features_of_some_of_a_clocks_steps_are_those_of_these_steps(original: Path, tmp_path: Path) -> None:
    output = compressed(original, tmp_path / "out", ROUGH, RANGES)
    network, theirs = aerogel.load(output), aerogel.load(original)
    every, some = (Temporal(steps=steps).measure(network, theirs) for steps in (4, 2))
    rows = [every["steps"].index(step) for step in some["steps"]]
    assert [[errors[row] for row in rows] for errors in every["errors"]] == some["errors"]


def test_it_runs_when_asked_for() -> None:
    network = aerogel.load(unconditional())
    assert "temporal" not in measure(network, network)["compressed"]
    assert set(measure(network, network, ["temporal"], overrides=["temporal.steps=2"])["compressed"]) == {"temporal"}


def test_what_cannot_be_compared_is_refused() -> None:
    network, labelled = aerogel.load(unconditional()), aerogel.load(classes())
    with pytest.raises(AerogelError, match="temporal compares with the original"):
        Temporal().measure(network)
    with pytest.raises(AerogelError, match="also depend on the class label"):
        Temporal(steps=2).measure(labelled, labelled)
    with pytest.raises(AerogelError, match="came without its pipeline"):
        Temporal(steps=2).measure(opened("unet"), opened("unet"))
    with pytest.raises(AerogelError, match="steps 0: a sampler makes at least 1"):
        Temporal(steps=0).measure(network, network)


def test_another_network_and_a_broken_one_are_named() -> None:
    network, other, broken = (aerogel.load(unconditional()) for _ in range(3))
    wide = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 96), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    other.processor.unet = other.module = wide
    with pytest.raises(AerogelError, match=r"down_blocks\.1\.resnets\.0\.time_emb_proj has features of another shape than in the original"):
        Temporal(steps=2).measure(other, network)
    with torch.no_grad():
        broken.module.get_submodule("mid_block.resnets.0.time_emb_proj").weight[0] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(AerogelError, match=r"mid_block\.resnets\.0\.time_emb_proj has temporal features that are NaN or infinite"):
        Temporal(steps=2).measure(broken, network)
