"""A run as it is asked for: recipe files with model, data and output, arguments that win over them, and the way back from a record."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aerogel.engine.calibration import CalibrationRequest
from aerogel.engine.requests import Adjustments, ModelOptions, RunRequest, recipe_file_of
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.io.record.schema import Record
from aerogel.recipe import Recipe
from tests.folders import model_folder

RUN: dict[str, Any] = {
    "name": "mine",
    "model": {"name": "owner/model", "revision": "v1", "dtype": "bfloat16"},
    "data": {"source": "my.txt", "samples": 12, "length": 64, "seed": 7},
    "output": "out",
    "steps": [{"gptq": {"scheme": "W4A16_G32"}}],
}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    return written(tmp_path, RUN)


def written(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_a_file_says_all_of_a_run(run_file: str) -> None:
    request = RunRequest.of(run_file)
    assert request.model == "owner/model"
    assert request.options == ModelOptions("bfloat16", "v1")
    assert request.samples == CalibrationRequest("my.txt", 12, 64)
    assert (request.seed, request.output) == (7, Path("out"))
    assert request.recipe == Recipe.parse({"name": "mine", "steps": RUN["steps"]})


def test_arguments_win_over_the_file(run_file: str) -> None:
    request = RunRequest.of(
        run_file,
        model="other/model",
        options=ModelOptions("float32", trust_remote_code=True),
        adjustments=Adjustments(["gptq.percdamp=0.1"], scheme="W3A16_G32", ignore=["*.o_proj"]),
        samples=CalibrationRequest(length=32),
        seed=0,
        output=Path("there"),
    )
    assert request.model == "other/model"
    assert request.options == ModelOptions("float32", None, True), "a revision in the file is of the model in the file"
    assert request.samples == CalibrationRequest("my.txt", 12, 32)
    assert (request.seed, request.output) == (0, Path("there"))
    ((step,),) = (request.recipe.steps,)
    assert step.as_dict()["gptq"]["scheme"] == "W3A16_G32"
    assert step.as_dict()["gptq"]["percdamp"] == 0.1
    assert step.as_dict()["gptq"]["ignore"] == ["lm_head", "*.o_proj"]
    assert RunRequest.of(run_file, model="owner/model", options=ModelOptions(revision="v2")).options.revision == "v2"


def test_prompts_give_way_to_a_file_of_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, {"model": "m", "data": {"prompts": ["a cat"], "steps": 4}, "steps": [{"fora": {}}]})
    assert RunRequest.of(path).samples == CalibrationRequest(steps=4, prompts=("a cat",))
    assert RunRequest.of(path, samples=CalibrationRequest("prompts.txt")).samples == CalibrationRequest("prompts.txt", steps=4)


def test_a_plain_recipe_asks_for_a_model_and_an_output() -> None:
    with pytest.raises(AerogelError, match=r"^no model is given: add MODEL, or `model` to the recipe file \(recipe 'rtn-w8a8' has none\)$"):
        RunRequest.of("rtn-w8a8")
    request = RunRequest.of("rtn-w8a8", model="here")
    assert (request.seed, request.samples, request.options) == (0, CalibrationRequest(), ModelOptions())
    with pytest.raises(AerogelError, match=r"^no output is given: add --output, or `output` to the recipe file"):
        request.require_output()


@pytest.mark.parametrize(
    ("samples", "batch_size", "told"),
    [
        (CalibrationRequest("my.txt"), None, "--data would have no effect; leave it out"),
        (CalibrationRequest(column="body"), None, "--column would have no effect; leave it out"),
        (
            CalibrationRequest(count=4, num_frames=5),
            "2",
            "--samples and --num-frames and --batch-size would have no effect; leave them out",
        ),
    ],
)
def test_data_that_no_step_reads_is_refused(samples: CalibrationRequest, batch_size: str | None, told: str, tmp_path: Path) -> None:
    steps = {"steps": [{"rtn": {"scheme": "W4A16_G32"}}], "name": "plain"}
    with pytest.raises(AerogelError, match=rf"^recipe 'plain' reads no calibration data \(its steps: rtn\), so {told}, or take a recipe"):
        RunRequest.of(written(tmp_path, steps), model="m", samples=samples, batch_size=batch_size)
    reading = {**steps, "steps": [*steps["steps"], {"kv_cache_fp8": {}}]}
    assert RunRequest.of(written(tmp_path, reading), model="m", samples=samples, batch_size=batch_size).samples == samples


def test_data_in_a_file_that_its_steps_do_not_read_is_refused(tmp_path: Path) -> None:
    plain = RUN | {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
    with pytest.raises(AerogelError, match=r"so data\.source in its file and data\.samples in its file and data\.length in its file would"):
        RunRequest.of(written(tmp_path, plain))
    assert RunRequest.of(written(tmp_path, plain | {"data": {"seed": 3}}), batch_size="auto").seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "m"}, r"run\.yaml: unknown key 'modle'; did you mean model\?"),
        ({"data": {"sauce": "x"}}, r"run\.yaml, data: unknown key 'sauce'; did you mean source or"),
        ({"model": {"name": "m", "revison": "x"}}, r"run\.yaml, model: unknown key 'revison'; did you mean revision\?"),
        ({"model": {"revision": "x"}}, r"model\.name: Field required; expected `model` to be a name or \{name, revision, dtype\}"),
        (
            {"model": {"name": "m", "dtype": "int8"}},
            r"model\.dtype: Input should be 'auto', 'bfloat16', 'float16' or 'float32', got 'int8'",
        ),
        ({"model": ["m"]}, r"model: .*; expected `model` to be a name or"),
        (
            {"data": "sotu"},
            r"data: .*; expected `data` to be a mapping of source, column, prompts, samples",
        ),
        ({"data": {"samples": 0}}, r"data\.samples: Input should be greater than or equal to 1, got 0"),
        ({"data": {"samples": "12"}}, r"data\.samples: Input should be a valid integer, got '12'"),
        ({"data": {"seed": 1.5}}, r"data\.seed: .*integer, got 1\.5"),
        ({"data": {"guidance": float("nan")}}, r"data\.guidance: .*finite number, got nan"),
        ({"output": 3}, r"output: Input should be a valid string, got 3"),
        ({"trust_remote_code": True}, r"unknown key 'trust_remote_code'"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message) as raised:
        RunRequest.of(written(tmp_path, RUN | change))
    assert "\n" not in str(raised.value)


def test_in_python_a_run_file_is_read_for_its_steps_and_says_so(run_file: str) -> None:
    with pytest.warns(UserWarning, match="recipe 'mine' also has a model, data or an output, which only the command line reads"):
        recipe = Recipe.parse(run_file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunRequest.of(run_file).recipe == recipe


def record(**parts: Any) -> Record:
    plain: dict[str, Any] = {
        "model": {"name": "model", "source": "owner/model", "revision": "abc", "compute_dtype": "bfloat16"},
        "recipe": Recipe.parse("gptq-w4a16").as_dict(),
        "provenance": {"date": "2026-01-02", "seed": 3, "versions": {"aerogel": "1.0"}, "calibration": {}},
    }
    return Record.model_validate({**plain, **parts})


def asked(record: Record, tmp_path: Path) -> RunRequest:
    path = tmp_path / "again.yaml"
    path.write_text(recipe_file_of(record))
    return RunRequest.of(str(path))


def test_a_record_becomes_a_file_of_the_same_run(tmp_path: Path) -> None:
    facts = {"source": "sotu", "count": 9, "length": 48, "fingerprint": "sha256:0"}
    found = record(provenance={"seed": 3, "calibration": facts})
    request = asked(found, tmp_path)
    assert request.recipe == Recipe.parse("gptq-w4a16")
    assert (request.model, request.options) == ("owner/model", ModelOptions("bfloat16", "abc"))
    assert (request.samples, request.seed, request.output) == (CalibrationRequest("sotu", 9, 48), 3, None)


def test_generations_of_a_diffusion_model_are_named_by_their_prompts(tmp_path: Path) -> None:
    facts = {"source": "DiTPipeline", "sampler": "DDIM", "count": 4, "steps": 5, "guidance": None, "prompts": ["a cat"], "batch": 8}
    request = asked(record(provenance={"seed": 0, "calibration": facts}), tmp_path)
    assert request.samples == CalibrationRequest(count=4, steps=5, prompts=("a cat",))
    assert request.batch_size == "auto"
    assert asked(record(provenance={"calibration": {**facts, "batch": 2}}), tmp_path).batch_size == 2


def test_the_size_of_a_call_is_a_number_or_auto(tmp_path: Path) -> None:
    path = written(tmp_path, RUN | {"data": {"batch_size": 4}})
    assert RunRequest.of(path).batch_size == 4
    assert RunRequest.of(path, batch_size="2").batch_size == 2
    assert RunRequest.of(path, batch_size="auto").batch_size == "auto"
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(AerogelError, match=f"^--batch-size {wrong} is neither auto nor a whole number from 1 to 1,000,000$"):
            RunRequest.of(path, batch_size=wrong)


def test_a_device_that_is_not_here_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(AerogelError, match="device 'warp' is unknown; give auto, cpu"):
        ModelOptions(device="warp").locate("owner/model")


def test_what_no_file_can_name_is_refused_or_said(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="calibrated on calls that were given in Python"):
        recipe_file_of(record(provenance={"calibration": {"source": "given calls", "count": 2}}))
    said = recipe_file_of(record(model={"name": "Llama"}))
    assert "\n# The model was an object in Python: add MODEL to the command.\n" in said
    assert "model" not in yaml.safe_load(said)


def test_a_model_and_its_original_are_found_with_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(model_folder(tmp_path / "here"))
    found: list[Any] = []
    monkeypatch.setattr("aerogel.engine.requests.locate", lambda name, **how: found.append((name, how["revision"])))
    options = ModelOptions(revision="v1")
    options.locate_pair(here, "owner/model")
    options.locate_pair("owner/model", here)
    options.locate_pair("owner/model", None)
    assert found == [(here, None), ("owner/model", "v1"), ("owner/model", "v1"), (here, None), ("owner/model", "v1")]
    with pytest.raises(AerogelError, match="--revision could be of owner/a or of owner/b; download one of them"):
        options.locate_pair("owner/a", "owner/b")
    found.clear()
    ModelOptions().locate_pair("owner/a", "owner/b")
    assert found == [("owner/a", None), ("owner/b", None)]


def test_names_of_dtypes_are_those_of_torch(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "model"))
    assert ModelOptions("float16").locate(folder).dtype is torch.float16
    assert ModelOptions("auto").locate(folder).dtype is None
    assert ModelOptions().locate(folder).dtype is None


def test_everything_of_a_run_is_computed_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    source = ModelOptions("bfloat16").locate(str(model_folder(tmp_path / "model")))
    result = compress(source, "rtn-w8a8", output=tmp_path / "out", measures=["kl_divergence"])
    assert next(result.network.module.model.norm.parameters()).dtype == torch.bfloat16
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32, "what is saved keeps its dtype"
    assert result.record.model.compute_dtype == "bfloat16"
