"""A policy without weights: it does on a pipeline of the same weights what it did in its folder, and says what it was made for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import aerogel
from aerogel.cli import commands as cli
from aerogel.data.denoising import Denoising
from aerogel.engine import policies
from aerogel.engine.exporting import source_of
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.export.cache_policy import CachePolicy
from aerogel.io.fingerprint import fingerprint
from aerogel.io.save import resident
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from tests import image_pipelines
from tests.tiny import FAMILIES, fill

WANTED = Denoising(count=2, steps=4, batch=2)
LEARNED = {"harmonica": {"ratio": 0.3, "trajectories": 2}}


def pipeline(seed: int = 0, layers: int = 2) -> Any:
    """The dit_pipeline of classes, of several blocks that all matter."""
    made = image_pipelines.classes(seed)
    torch.manual_seed(seed)
    module = diffusers.DiTTransformer2DModel.from_config(dict(made.transformer.config) | {"num_layers": layers}).eval()
    fill(module, torch.Generator().manual_seed(seed))
    made.register_modules(transformer=module.requires_grad_(False), scheduler=diffusers.DDIMScheduler(clip_sample=False))
    return made


def paint(made: Any, steps: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(made(class_labels=[0, 7], num_inference_steps=steps, generator=generator, output_type="pt").images)


def exported(source: Any, folder: Path, *steps: dict[str, Any], name: str = "cache_policy") -> Path:
    """Compress by these steps and export."""
    aerogel.compress(source, {"steps": list(steps)}, samples=WANTED, measures=(), output=folder / "master")
    done = CliRunner().invoke(cli.app, ["export", str(folder / "master"), "-f", name, "-o", str(folder / name)])
    assert done.exit_code == 0, done.output
    return folder / name


def facts(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "aerogel.json").read_text())
    return read


@pytest.mark.parametrize("step", [LEARNED, {"delta_dit": {"share": 0.5}}])
def test_it_paints_what_its_folder_paints(step: dict[str, Any], tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, step)
    fresh = pipeline()
    before = paint(fresh)
    with aerogel.cached(fresh, tmp_path / "master"):
        wanted = paint(fresh)
    with aerogel.cached(fresh, out):
        assert torch.equal(paint(fresh), wanted)
    assert torch.equal(paint(fresh), before)
    assert not torch.equal(wanted, before)
    kept = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert kept == ({"aerogel.json", "aerogel/policies.safetensors"} if step is LEARNED else {"aerogel.json"})
    assert facts(out)["policies"] == facts(tmp_path / "master")["policies"]
    assert facts(out)["recipe"] == facts(tmp_path / "master")["recipe"]
    assert facts(out)["model"]["family"] == "dit"


def test_it_says_what_the_schedule_saves(tmp_path: Path) -> None:
    """Beside widths multiplied by hand, and beside what the cache entries hold while it runs."""
    out = exported(pipeline(), tmp_path, LEARNED)
    state = facts(out)["policies"][0]["state"]
    tokens, width = 16, 16  # 8 x 8 latents in patches of 2 x 2; two heads of 8
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    forward = 2 * tokens * width * 4 * width
    skipped = sum((attention, forward)[place % 2] for row in state["computed"] for place, one in enumerate(row) if one == "0")
    assert skipped > 0
    assert state["macs_saved"] * 4 * state["macs"] == pytest.approx(skipped)
    assert 2 * (attention + forward) < state["macs"] < 4 * (attention + forward)
    network = open_model(pipeline())
    with caching(network, Schedule.of(network, policies.load(out)[0].state)) as reuse:
        paint(network.processor)
    assert state["cache_bytes"] == reuse.peak_bytes / 4 > 0  # two images under guidance
    assert {"steps", "sampler", "modules", "guidance", "error"} <= state.keys()


@pytest.mark.parametrize("step", [{"taylorseer": {}}, {"toca": {}}, {"delta_dit": {}}])
def test_what_does_more_than_reuse_is_not_said_to_save_what_its_table_does(step: dict[str, Any], tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, step)
    assert "macs_saved" not in facts(out)["policies"][0]["state"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_the_same_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Stored in half, computed in float32, or live in half."""
    given = pipeline()
    given.transformer.to(dtype)
    given.save_pretrained(tmp_path / "half")
    out = exported(tmp_path / "half", tmp_path, {"fora": {}})
    opened = open_model(tmp_path / "half", dtype=torch.float32)
    assert next(opened.module.parameters()).dtype == torch.float32
    assert facts(out)["model"]["dtype"] == str(dtype).removeprefix("torch.")
    for live in (opened.module, opened.module.to(dtype), opened.module.to(torch.bfloat16)):
        assert fingerprint(resident(live)) == facts(out)["model"]["fingerprint"]


def test_the_fingerprint_is_of_names_shapes_and_values_in_any_order() -> None:
    weight, codes = torch.randn(3, 4), torch.arange(6, dtype=torch.int8)
    given = fingerprint([("a", weight), ("b", codes)])
    assert given.startswith("sha256:")
    assert fingerprint([("b", codes), ("a", weight.bfloat16())]) == given
    others = [
        [("a", weight), ("c", codes)], [("a", weight.T), ("b", codes)], [("a", weight.T.contiguous().view(3, 4)), ("b", codes)],
        [("a", weight), ("b", codes.int())], [("a", weight), ("b", codes + 1)], [("a", weight)],
    ]  # fmt: skip
    assert len({fingerprint(other) for other in others} | {given}) == len(others) + 1
    assert fingerprint([("a", torch.ones(2).to(torch.float8_e4m3fn)), ("b", torch.tensor(1.0)), ("c", torch.empty(0))])


def test_quantized_weights_have_a_fingerprint_of_their_own(tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, {"rtn": {"scheme": "W8A8"}}, {"fora": {}})
    assert facts(out)["model"]["quantization"]["config_groups"]
    quantized = open_model(tmp_path / "master")
    with aerogel.cached(quantized, out):
        within = paint(quantized.processor)
    assert torch.equal(within, paint(aerogel.load(tmp_path / "master").processor))
    plain = pipeline()
    before = paint(plain)
    with pytest.warns(UserWarning, match="was made for") as told, aerogel.cached(plain, out):
        assert not torch.equal(paint(plain), before)
    (message,) = [str(one.message) for one in told]
    assert facts(out)["model"]["fingerprint"] in message
    assert fingerprint(resident(plain.transformer)) in message
    assert told[0].filename == __file__


def test_other_weights_are_a_warning_and_run(tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, {"fora": {}})
    assert facts(out)["model"]["quantization"] is None
    other = pipeline(seed=5)
    before = paint(other)
    message = r"was made for DiTTransformer2DModel with weights sha256:\w{64}, this model has sha256:\w{64}"
    with pytest.warns(UserWarning, match=message), aerogel.cached(other, out):
        assert not torch.equal(paint(other), before)
    with warnings.catch_warnings():  # nobody says which weights
        warnings.simplefilter("error")
        with aerogel.cached(other, tmp_path / "master"):
            pass


def test_other_networks_and_samplers_are_refused(tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, {"fora": {}})
    with (
        pytest.raises(AerogelError, match="of the dit family, and this model is of the pixart family"),
        aerogel.cached(FAMILIES["pixart"].build(), out),
    ):
        pass
    with (
        pytest.raises(AerogelError, match=r"the schedule is of 4 modules, this denoiser has 6; transformer_blocks\.2\.attn1 is"),
        aerogel.cached(pipeline(layers=3), out),
    ):
        pass
    same = pipeline()
    with aerogel.cached(same, out), pytest.raises(AerogelError, match="that comes at step 1 of the 4 of DDIMScheduler"):
        paint(same, steps=5)
    same.scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace")
    with aerogel.cached(same, out), pytest.raises(AerogelError, match="use that sampler with that many steps"):
        paint(same)


def test_other_numbers_of_blocks_are_refused(tmp_path: Path) -> None:
    out = exported(pipeline(), tmp_path, {"delta_dit": {}})
    with (
        pytest.raises(AerogelError, match="made for 2 blocks, this denoiser has 3"),
        aerogel.cached(pipeline(layers=3), out),
    ):
        pass


def test_folders_without_a_caching_policy_are_refused(tmp_path: Path) -> None:
    aerogel.compress(pipeline(), "rtn-w8a8", samples=WANTED, measures=(), output=tmp_path / "master")
    (reason,) = CachePolicy().refuse(source_of(tmp_path / "master"))
    assert "no caching policy" in reason
    with pytest.raises(AerogelError, match="cannot be written as CachePolicy: it has no caching policy"):
        CachePolicy().write(source_of(tmp_path / "master"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline().save_pretrained(tmp_path / "plain")
    assert CachePolicy().refuse(source_of(tmp_path / "plain"))
