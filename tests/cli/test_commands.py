"""The command line: what it prints, for people and for scripts, and how fast it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from aerogel import catalog
from aerogel.cli import commands as cli
from aerogel.cli import terminal
from aerogel.engine.opening import open_model
from aerogel.layers.linear import QuantLinear
from aerogel.methods.quantization.gptq import Gptq
from tests.folders import digests, model_folder, text_file
from tests.image_pipelines import unconditional


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Commands set torch's threads; tests leave them as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*command: object) -> str:
    """Run a command that must succeed; returns what it prints on standard output."""
    result = CliRunner().invoke(cli.app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*command: object) -> Any:
    return json.loads(run(*command, "--json"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a recipe, and the output of compressing the one by the other."""
    folder = tmp_path_factory.mktemp("desk")
    text_file(folder / "text.txt", 20000)
    (folder / "own.yaml").write_text("# Two widths\nsteps:\n  - gptq: {scheme: W4A16_G32, overrides: {'*.down_proj': W8A16_G32}}\n")
    model_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def compressed(desk: Path) -> Any:
    """What `compress` says when it is asked for JSON."""
    samples = ("--data", desk / "text.txt", "--samples", 6, "--length", 24)
    return as_json("compress", desk / "model", "-r", desk / "own.yaml", "-o", desk / "out", *samples, "--seed", 3, "--threads", 1)


def test_compress_writes_a_folder_and_a_report(desk: Path, compressed: Any) -> None:
    assert compressed["folder"] == str(desk / "out")
    assert Path(compressed["report"]).read_text().startswith("<!")
    assert compressed["provenance"]["seed"] == 3
    assert compressed["provenance"]["machine"]["threads"] == 1
    assert compressed["metrics"]["original"]["size"]["stored_bytes"] > compressed["metrics"]["compressed"]["size"]["stored_bytes"]
    assert 0.5 < compressed["metrics"]["compressed"]["kl_divergence"]["top1"] <= 1
    network = open_model(desk / "out", lazy=False).module
    schemes = {name: str(part.scheme) for name, part in network.named_modules() if isinstance(part, QuantLinear)}
    assert schemes["model.layers.0.mlp.down_proj"] == "W8A16_G32"
    assert schemes["model.layers.1.mlp.up_proj"] == "W4A16_G32"


def test_compress_ends_with_a_comparison(desk: Path, tmp_path: Path) -> None:
    said = run("compress", desk / "model", "-r", "rtn-w8a8", "-o", tmp_path / "out", "--set", "rtn.scheme=W8A16_G32", "--evaluate")
    for line in ("Weights on disk", "Perplexity", "KL divergence from the original", "Same next token"):
        assert line in said
    assert re.search(rf"folder +{re.escape(str(tmp_path / 'out'))}\nreport +{re.escape(str(tmp_path / 'out' / 'report.html'))}\n$", said)


def test_plan_changes_nothing_and_says_what_would_be(desk: Path, compressed: Any) -> None:
    before = digests(desk)
    made = as_json("plan", desk / "model", "-r", desk / "own.yaml")
    assert len(made["touched"]) == compressed["plan"]["layers"] == 14
    assert made["predicted_bytes"] == compressed["plan"]["predicted_bytes"]
    said = run("plan", desk / "model", "-r", desk / "own.yaml")
    assert "gptq stores 12 linear layers in W4A16_G32" in said
    assert "gptq stores 2 linear layers in W8A16_G32" in said
    assert "not quantized: lm_head: ignored by the recipe" in said
    assert "an estimate" in said
    assert digests(desk) == before


def test_problems_of_a_plan_are_told_on_standard_error_too_where_json_is_printed(desk: Path) -> None:
    refused = CliRunner().invoke(cli.app, ["plan", str(desk / "model"), "-r", str(desk / "own.yaml"), "--scheme", "W4A16_G48", "--json"])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [f"error: {problem}" for problem in json.loads(refused.stdout)["problems"]]


def test_evaluate_adds_to_the_record(desk: Path, compressed: Any) -> None:
    before = digests(desk / "model")
    metrics = as_json("evaluate", desk / "out", "--against", desk / "model", "--measure", "size")
    assert metrics["compressed"]["size"]["disk_bytes"] == (desk / "out" / "model.safetensors").stat().st_size
    recorded = json.loads((desk / "out" / "aerogel.json").read_text())["metrics"]
    assert recorded["compressed"]["size"] == metrics["compressed"]["size"]
    assert recorded["compressed"]["kl_divergence"] == compressed["metrics"]["compressed"]["kl_divergence"]
    assert "Weights on disk" in run("evaluate", desk / "out", "--measure", "size")
    run("evaluate", desk / "model", "--measure", "size")
    said = as_json(
        "evaluate", desk / "model", "--measure", "generation", "--set", "generation.new_tokens=2", "--set", "generation.prompts=[one]"
    )
    assert [sample["prompt"] for sample in said["original"]["generation"]["samples"]] == ["one"]
    assert digests(desk / "model") == before


def test_names_in_brackets_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_comparison({"compressed": {"image_quality": {"frechet[a-judge]": 1.25}}})
    assert "Fréchet distance [a-judge]" in capsys.readouterr().out


def test_texts_are_printed_under_the_name_of_who_wrote_them(desk: Path, compressed: Any) -> None:
    options = ("--measure", "generation", "--set", "generation.new_tokens=2", "--set", "generation.prompts=[one,two]")
    alone = run("evaluate", desk / "model", *options)
    assert [line.partition(":")[0] for line in alone.splitlines() if line] == ["prompt", "original"] * 2
    both = run("evaluate", desk / "out", "--against", desk / "model", *options)
    assert [line.partition(":")[0] for line in both.splitlines() if line[:1] not in ("", "(")] == ["prompt", "original", "compressed"] * 2
    sized = run("evaluate", desk / "model", "--measure", "size")
    assert "original" in sized
    assert "compressed" not in sized
    assert "original" not in run("evaluate", desk / "out", "--measure", "size")


def test_bench_times_both_and_adds_to_the_record(desk: Path, compressed: Any) -> None:
    assert compressed["metrics"]["compressed"]["speed"]["prompt"] == 96, "a tiny model has room for 128 tokens"
    metrics = as_json("bench", desk / "out", "--against", desk / "model", "--prompt", 8, "--new-tokens", 3, "--batch", 2)
    for whose in ("original", "compressed"):
        assert metrics[whose]["speed"]["decode_tokens_per_second"] == 2.0, "two rows a step, and the tests' clock says a second"
    recorded = json.loads((desk / "out" / "aerogel.json").read_text())["metrics"]
    assert recorded["compressed"]["speed"] == metrics["compressed"]["speed"]
    assert "Decode, tokens per second" in run("bench", desk / "out", "--prompt", 8, "--new-tokens", 3)


@pytest.mark.parametrize("command", ["compress", "export", "evaluate"])
def test_a_folder_whose_weights_were_changed_is_refused(command: str, desk: Path, compressed: Any, tmp_path: Path) -> None:
    shutil.copytree(desk / "out", tmp_path / "copy")
    weights = tmp_path / "copy/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    options = {
        "compress": ["-r", desk / "own.yaml", "-o", tmp_path / "no", "--data", desk / "text.txt", "--samples", 6, "--length", 24],
        "export": ["-f", "gptq", "-o", tmp_path / "no"],
        "evaluate": [],
    }[command]
    refused = CliRunner().invoke(cli.app, [command, str(tmp_path / "copy"), *map(str, options)])
    assert refused.exit_code == 2
    assert f"{weights} is not what aerogel.json has the checksum of" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_options_of_exporters_can_be_set(desk: Path, compressed: Any, tmp_path: Path) -> None:
    run("export", desk / "out", "-f", "gptq", "-o", tmp_path / "gptq", "--set", "gptq.max_shard_size=20000")
    assert len(list((tmp_path / "gptq").glob("*.safetensors"))) > 1
    for setting, message in {
        "gptq.max_shard": "exporter 'gptq': unknown option 'max_shard'; did you mean max_shard_size",
        "gguf.requantize": "an option of 'gguf' is set, but the folder is exported by 'gptq'",
    }.items():
        refused = CliRunner().invoke(
            cli.app, ["export", str(desk / "out"), "-f", "gptq", "-o", str(tmp_path / "no"), "--set", f"{setting}=1"]
        )
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (tmp_path / "no").exists()


def test_bench_of_images(tmp_path: Path) -> None:
    unconditional().save_pretrained(tmp_path / "pipeline")
    metrics = as_json("bench", tmp_path / "pipeline", "--steps", 2, "--rounds", 1, "--batch", 2)
    assert metrics["original"]["sampling"]["images_per_minute"] == 24.0, "two images in five readings of the tests' clock"
    refused = CliRunner().invoke(cli.app, ["bench", str(tmp_path / "pipeline"), "--prompt", "8"])
    assert refused.exit_code == 2
    assert "a benchmark of image models: unknown option 'prompt'" in refused.stderr


def test_export_rewrites_for_another_engine(desk: Path, compressed: Any, tmp_path: Path) -> None:
    assert run("export", desk / "out", "-f", "gptq", "-o", tmp_path / "gptq").strip() == str(tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def test_report_is_written_anywhere(desk: Path, compressed: Any, tmp_path: Path) -> None:
    assert run("report", desk / "out", "-o", tmp_path / "r.html").strip() == str(tmp_path / "r.html")
    assert "own" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kind", cli.Kind)
def test_list_names_everything_with_a_line(kind: cli.Kind) -> None:
    lines = as_json("list", kind)
    assert lines
    assert all(lines.values())
    assert [line.split()[0] for line in run("list", kind).splitlines()] == list(lines)
    if kind is not cli.Kind.models:
        assert list(lines) == catalog.names(kind)


def test_show_says_what_a_method_does_and_its_options() -> None:
    card, exporter = as_json("show", "gptq")
    assert (card["kind"], exporter["kind"]) == ("methods", "exporters")
    assert "arXiv:2210.17323" in card["about"]
    assert card["requires"] == ["calls", "uncached"]
    percdamp = next(option for option in card["options"] if option["name"] == "percdamp")
    assert percdamp == {"name": "percdamp", "type": "float", "about": percdamp["about"], "default": Gptq.percdamp}
    said = run("show", "gptq")
    assert "percdamp: float = 0.01" in said
    assert percdamp["about"] in said


def test_show_knows_every_name() -> None:
    for kind in catalog.KINDS:
        for name in catalog.names(kind):
            card = next(card for card in as_json("show", name) if card["kind"] == kind)
            assert card["about"]
            assert Path(card["file"]).is_file()


def test_show_spells_a_recipe_out() -> None:
    assert as_json("show", "gptq-w4a16")[0]["steps"][0]["gptq"]["scheme"] == "W4A16_G64"
    shown = run("show", "gptq-w4a16")
    assert "1. gptq\n" in shown
    assert "\n    scheme: 'W4A16_G64'\n" in shown


def test_help_names_every_command_and_starts_at_once() -> None:
    """Without what takes seconds to import."""
    script = (
        "import runpy, sys\n"
        "sys.argv = ['aerogel', '--help']\n"
        "try:\n"
        "    runpy.run_module('aerogel', run_name='__main__')\n"
        "finally:\n"
        "    print('heavy:', *sorted({'torch', 'transformers', 'diffusers', 'numpy', 'safetensors'} & sys.modules.keys()))\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for command in ("compress", "plan", "search", "evaluate", "bench", "export", "report", "list", "show"):
        assert f" {command} " in said
    assert said.splitlines()[-1] == "heavy:"


def test_every_option_is_explained() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert command.help, name
        assert all(getattr(option, "help", None) for option in command.params), name


def test_help_shows_the_defaults() -> None:
    """Rich markup would drop a default in brackets, such as [sotu], as an unknown style."""
    shown = " ".join(run("compress", "--help").split())
    for default in ("sequences [128]", "or images [64] or videos [8]", "sequence [512]", "data [sotu]", "with [20]", "seed [0]"):
        assert default in shown
    assert "may be repeated [all]" in " ".join(run("search", "--help").split())
