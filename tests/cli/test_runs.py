"""Options of a run: recipes adjusted, recipe files of whole runs and back, dtypes, models of the hub, pushing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from aerogel.cli import commands as cli
from aerogel.cli.group import DATA, MODEL, RECIPE
from aerogel.engine import pushing
from aerogel.errors import AerogelError
from tests.folders import digests, model_folder, text_file
from tests.hub import COMMIT, running


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    text_file(folder / "text.txt")
    model_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def run_file(desk: Path) -> Path:
    """A file that says all of a run."""
    run = {
        "model": str(desk / "model"),
        "data": {"source": str(desk / "text.txt"), "samples": 6, "length": 24, "seed": 5},
        "output": str(desk / "out"),
        "steps": [{"gptq": {"scheme": "W4A16_G32"}}],
    }
    (desk / "run.yaml").write_text(yaml.safe_dump(run))
    return desk / "run.yaml"


def run(*command: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    return result


def refused(*command: object) -> str:
    result = CliRunner().invoke(cli.app, [str(part) for part in command])
    assert result.exit_code == 2, result.output
    line = result.stderr.removesuffix("\n")
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def planned(desk: Path, *options: object) -> Any:
    return json.loads(run("plan", desk / "model", *options, "--json").stdout)


@pytest.fixture(scope="module")
def made(run_file: Path) -> Any:
    """What `compress` says of the run in the file."""
    return json.loads(run("compress", "--recipe", run_file, "--no-evaluate", "--threads", 1, "--json").stdout)


def test_one_file_says_all_of_a_run(desk: Path, made: Any) -> None:
    assert made["folder"] == str(desk / "out")
    assert made["provenance"]["seed"] == 5
    assert made["provenance"]["calibration"]["source"] == str(desk / "text.txt")
    assert made["model"]["source"] == str(desk / "model")


def test_a_record_becomes_a_file_that_repeats_the_run(desk: Path, made: Any) -> None:
    (desk / "again.yaml").write_text(run("show", desk / "out", "--recipe").stdout)
    run("compress", "--recipe", desk / "again.yaml", "--output", desk / "again", "--no-evaluate", "--threads", 1)
    assert digests(desk / "again")["model.safetensors"] == digests(desk / "out")["model.safetensors"]
    assert refused("compress", "--recipe", desk / "again.yaml").startswith("error: no output is given: add --output")


def test_arguments_win_over_the_file(desk: Path, run_file: Path, made: Any) -> None:
    changed = ("--scheme", "W8A16_G32", "--samples", 4, "--seed", 6, "--output", desk / "other")
    said = json.loads(run("compress", "--recipe", run_file, *changed, "--no-evaluate", "--json").stdout)
    assert said["folder"] == str(desk / "other")
    assert said["provenance"]["seed"] == 6
    assert said["provenance"]["calibration"]["count"] == 4
    assert said["recipe"]["steps"][0]["gptq"]["scheme"] == "W8A16_G32"


def test_an_output_in_a_file_is_not_overwritten(desk: Path, run_file: Path, made: Any) -> None:
    before = digests(desk)
    assert "out: this folder exists and is not empty" in refused("compress", "--recipe", run_file)
    assert digests(desk) == before


def test_a_plain_recipe_needs_a_model() -> None:
    assert "no model is given: add MODEL, or `model` to the recipe file" in refused("compress", "-r", "rtn-w8a8", "-o", "out")
    assert "no model is given" in refused("plan", "-r", "rtn-w8a8")


def test_layers_are_chosen_without_knowing_the_method(desk: Path) -> None:
    options = ("--scheme", "W8A16_G32", "--targets", "*.mlp.*", "--targets", "*.self_attn.q_proj", "--ignore", "*.down_proj")
    touched = planned(desk, "-r", "rtn-w4a16", *options)["touched"]
    assert {layer["scheme"] for layer in touched} == {"W8A16_G32"}
    assert {layer["name"].rpartition(".")[2] for layer in touched} == {"gate_proj", "up_proj", "q_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-r", "modes", "--scheme", "W4A16"), "has no step with the option scheme (its steps: modes); leave --scheme out"),
        (("-r", "rtn-w4a16", "--scheme", "W4A17"), "rtn: option 'scheme': unknown scheme 'W4A17'"),
        (("-r", "rtn-w4a16", "--set", "rtn.scheme=W4A16_G32", "--ignore", "*.o_prj"), "matches '*.o_prj' in ignore; did you mean *.o_proj"),
        (("-r", "rtn-w4a16", "--revision", "main"), "is not from there; leave --revision out"),
        (("-r", "gptq-w4a16", "--data", "none.txt"), "no text source 'none.txt'"),
        (("-r", "gptq-w4a16", "--length", "100000", "--samples", "1"), "one sequence needs 100000"),
        (("-r", "rtn-w4a16", "--device", "warp"), "device 'warp' is unknown; give auto, cpu, cuda"),
        (("-r", "gptq-w4a16", "--batch-size", "none"), "--batch-size none is neither auto nor a whole number from 1 to 1,000,000"),
        (("-r", "gptq-w4a16", "--guidance", "2"), "guidance does not apply to a language model"),
    ],
)
def test_what_cannot_be_is_one_line(desk: Path, options: tuple[str, ...], message: str) -> None:
    before = digests(desk)
    given = (*options, "--data", desk / "text.txt") if "--length" in options else options
    assert message in refused("plan", desk / "model", *given)
    assert digests(desk) == before


def test_an_unknown_dtype_is_refused(desk: Path) -> None:
    result = CliRunner().invoke(cli.app, ["plan", str(desk / "model"), "-r", "rtn-w8a8", "--dtype", "int8"])
    assert result.exit_code == 2
    assert "'auto', 'bfloat16', 'float16', 'float32'" in result.stderr


def test_the_plan_is_for_the_data_that_will_be_used(desk: Path) -> None:
    recipe = ("-r", "gptq-w4a16", "--scheme", "W4A16_G32", "--length", 24, "--samples", 200)
    result = run("plan", desk / "model", *recipe, "--data", desk / "text.txt", "--json")
    assert "gives 125 of the 200 sequences of 24 tokens asked for" in result.stderr.replace("\n", " ")
    fewer, more = json.loads(result.stdout), planned(desk, *recipe)
    assert fewer["activation_bytes"] < more["activation_bytes"]


def test_the_dtype_to_compute_in_is_used_and_recorded(desk: Path) -> None:
    options = ("-r", "rtn-w8a8", "-o", desk / "half", "--dtype", "bfloat16", "--no-evaluate", "--json")
    made = json.loads(run("compress", desk / "model", *options).stdout)
    assert made["model"]["compute_dtype"] == "bfloat16"
    assert "dtype: bfloat16" in run("show", desk / "half", "--recipe").stdout
    measured = {}
    for dtype in ("bfloat16", "float32"):
        options = ("--dtype", dtype, "--measure", "perplexity", "--set", "perplexity.tokens=64", "--set", "perplexity.length=32")
        measured[dtype] = json.loads(run("evaluate", desk / "model", *options, "--quiet", "--json").stdout)["original"]["perplexity"]
    assert measured["bfloat16"]["perplexity"] != measured["float32"]["perplexity"]


def test_a_model_of_the_hub(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, tmp_path / "cache") as hub:
        hub.models["owner/model"] = desk / "model"
        options = ("-r", "rtn-w8a8", "-o", tmp_path / "out", "--no-evaluate", "--json")
        made = json.loads(run("compress", "owner/model", *options, "--revision", "main").stdout)
        assert "has no revision 'v2'" in refused("plan", "owner/model", "-r", "rtn-w8a8", "--revision", "v2")
    assert made["model"]["name"] == made["model"]["source"] == "owner/model"
    assert made["model"]["revision"] == COMMIT
    assert yaml.safe_load(run("show", tmp_path / "out", "--recipe").stdout)["model"] == {"name": "owner/model", "revision": COMMIT}
    assert "the hub cannot be reached" in refused("plan", "owner/other", "-r", "rtn-w8a8")


def test_pushing_is_checked_before_any_work(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("compress", desk / "model", "-r", "rtn-w8a8", "-o", tmp_path / "out", "--no-evaluate")
    assert "'mine' is no name for a model on the hub; expected OWNER/NAME" in refused(*command, "--push-to-hub", "mine")

    def deny(name: str) -> None:
        raise AerogelError("there is no token for the hub; set HF_TOKEN")

    monkeypatch.setattr(pushing, "check", deny)
    assert "there is no token" in refused(*command, "--push-to-hub", "me/mine")
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_pushed(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []

    def push(folder: Path, name: str, **how: bool) -> str:
        pushed.append((folder, name, how))
        return f"https://hub/{name}"

    monkeypatch.setattr(pushing, "check", lambda name: None)
    monkeypatch.setattr(pushing, "push", push)
    command = ("compress", desk / "model", "-r", "rtn-w8a8", "-o", tmp_path / "out", "--no-evaluate", "--push-to-hub", "me/mine")
    assert run(*command).stdout.endswith("\nhub     https://hub/me/mine\n")
    assert run("push", tmp_path / "out", "me/mine", "--public", "--overwrite").stdout == "hub     https://hub/me/mine\n"
    out = tmp_path / "out"
    expected = [{"public": False, "overwrite": False}, {"public": True, "overwrite": True}]
    assert pushed == [(out, "me/mine", how) for how in expected]


def test_only_results_are_pushed_and_shown(desk: Path) -> None:
    assert "model has no aerogel.json; give a folder that `aerogel compress` wrote" in refused("push", desk / "model", "me/mine")
    assert "has no aerogel.json" in refused("show", desk / "model", "--recipe")


def test_a_plan_takes_what_decides_about_a_run() -> None:
    commands: Any = typer.main.get_command(cli.app)
    sections = {RECIPE, MODEL, DATA}
    asked = {
        name: {option.name for option in commands.commands[name].params if getattr(option, "rich_help_panel", None) in sections}
        for name in ("compress", "plan")
    }
    assert asked["plan"] == asked["compress"]
