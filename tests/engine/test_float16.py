"""What float16 does not hold is refused by the plan and by the run, before work: weights, and activations of one short call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.data.denoising import Denoising
from aerogel.engine import numbers
from aerogel.engine.calibration import CalibrationRequest, Samples
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.io.source import locate
from tests.questions import untrained, written
from tests.runtime.feature_cache.test_replay import dit_pipeline
from tests.tiny import FAMILIES
from tests.words import tokenizer

GPTQ, RTN = {"steps": [{"gptq": {"scheme": "W4A16_G16"}}]}, {"steps": [{"rtn": {"scheme": "W4A16_G16"}}]}
DOWN = "model.layers.1.mlp.down_proj"
OVERFLOW = rf"{DOWN}: its output overflows in float16: \d\.\d+e\+05 in float32, and float16 ends at 65,504; compute in bfloat16"


def folder(path: Path, factor: float = 1.0, dtype: torch.dtype = torch.bfloat16, **weights: float) -> Path:
    """A tiny Llama on disk whose one layer gives large numbers; `weights` are single numbers of tensors."""
    module = FAMILIES["llama"].build().to(dtype)
    with torch.no_grad():
        module.get_submodule(DOWN).weight.mul_(factor)
        for name, value in weights.items():
            module.get_parameter(name.replace("__", ".")).view(-1)[0] = value
    module.save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "book.txt").write_text("the people of the world and our peace " * 60)
    return path


def planned(path: Path, dtype: torch.dtype | None, recipe: Any = GPTQ) -> tuple[str, ...]:
    return plan(locate(path, dtype=dtype), recipe, samples=Samples(str(path / "book.txt"), 2, 16), flops_a_second=lambda: 1e9).problems


def test_the_plan_names_the_layer_and_its_number(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", 1e5)
    (problem,) = planned(path, torch.float16)
    assert re.match(OVERFLOW, problem)
    assert planned(path, torch.bfloat16) == planned(path, torch.float32) == planned(path, torch.float16, RTN) == ()
    assert planned(folder(tmp_path / "small"), torch.float16) == ()


def test_nothing_runs_in_other_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "first_overflow", lambda *_: pytest.fail("the network ran"))
    path = folder(tmp_path / "model", 1e5)
    assert planned(path, torch.bfloat16) == planned(path, torch.float32) == planned(path, torch.float16, RTN) == ()


def test_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", 1e5, torch.float16)
    module = FAMILIES["llama"].build()
    calls = FAMILIES["llama"].calls(1)
    with torch.no_grad():
        module.get_submodule(DOWN).weight.mul_(1e5)
    with pytest.raises(AerogelError, match=OVERFLOW):
        aerogel.compress(module.half(), GPTQ, samples=calls, measures=())
    with pytest.raises(AerogelError, match=OVERFLOW):
        aerogel.compress(
            locate(path, dtype=torch.float16), GPTQ, samples=Samples(str(path / "book.txt"), 2, 16), output=tmp_path / "out", measures=()
        )
    assert sorted(made.name for made in tmp_path.iterdir()) == ["model"]


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", 1e5)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("steps:\n  - gptq: {scheme: W4A16_G16}\n")
    data = ["--data", str(path / "book.txt"), "--samples", "2", "--length", "16", "--dtype", "float16"]
    told = CliRunner().invoke(app, ["compress", str(path), "--recipe", str(recipe), "--output", str(tmp_path / "out"), *data])
    assert told.exit_code == 2
    assert re.search(OVERFLOW, told.output.replace("\n", " "))
    assert CliRunner().invoke(app, ["plan", str(path), "--recipe", str(recipe), *data]).exit_code == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_beyond_float16_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", dtype=dtype, model__layers__0__mlp__up_proj__weight=-99840.0)
    reached = r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight reaches 99840, and float16 ends at 65,504; compute in bfloat16"
    for recipe in (GPTQ, RTN):
        (problem,) = planned(path, torch.float16, recipe)
        assert re.search(reached, problem)
        with pytest.raises(AerogelError, match=reached):
            aerogel.compress(
                locate(path, dtype=torch.float16),
                recipe,
                samples=Samples(str(path / "book.txt"), 2, 16),
                output=tmp_path / "out",
                measures=(),
            )
    with pytest.raises(AerogelError, match=reached):
        aerogel.load(path, dtype=torch.float16, lazy=False)
    assert planned(path, torch.bfloat16) == ()
    with pytest.raises(AerogelError, match=r"model\.norm\.weight reaches 1e\+06"):
        aerogel.load(folder(tmp_path / "glue", dtype=torch.float32, model__norm__weight=1e6), dtype=torch.float16)


def test_a_live_model_that_is_cast_is_asked_too() -> None:
    module = FAMILIES["llama"].build()
    module.get_submodule(DOWN).weight.data[3, 4] = 7e4
    with pytest.raises(AerogelError, match=rf"^{DOWN}\.weight reaches 70000, and float16 ends at 65,504"):
        open_model(module, dtype=torch.float16)
    assert module.dtype == torch.float32


def test_one_chat_about_an_image_is_enough(tmp_path: Path) -> None:
    module, pair = untrained()
    samples = CalibrationRequest(source=str(written(tmp_path, 4)), count=2)
    assert plan(open_model((module.half(), pair)), GPTQ, samples=samples, flops_a_second=lambda: 1e9).problems == ()
    large = "model.language_model.layers.3.self_attn.v_proj"
    with torch.no_grad():
        module.get_submodule(large).weight.mul_(1e6)
    (problem,) = plan(open_model((module, pair)), GPTQ, samples=samples, flops_a_second=lambda: 1e9).problems
    assert problem.startswith(f"{large}: its output overflows in float16: ")


def test_one_step_of_a_denoiser_is_enough() -> None:
    network = dit_pipeline()
    samples = Denoising(count=4, steps=3, batch=2)
    network.module.half()
    assert plan(network, GPTQ, samples=samples, flops_a_second=lambda: 1e9).problems == ()
    with torch.no_grad():
        network.module.get_submodule("transformer_blocks.0.ff.net.2").weight.mul_(1e6)
    (problem,) = plan(network, GPTQ, samples=samples, flops_a_second=lambda: 1e9).problems
    assert problem.startswith("transformer_blocks.0.ff.net.2: its output overflows in float16: ")
