"""`aerogel search` from the command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from aerogel.cli import commands as cli
from aerogel.data.denoising import Denoising, denoised
from aerogel.engine.search import pacing, sparsity
from tests.engine.search.test_caches import dit_pipeline
from tests.folders import model_folder, text_file


def work(pipeline: Any, denoiser: nn.Module, wanted: Denoising, seed: int, _: Callable[[], float]) -> float:
    """Instead of seconds, which nobody can foretell: the multiplications that the denoiser does."""
    counts: list[int] = []
    with FlopCounterMode(display=False) as counter:
        hooks = [
            denoiser.register_forward_pre_hook(lambda *_: counts.append(counter.get_total_flops())),
            denoiser.register_forward_hook(lambda *_: counts.append(counter.get_total_flops() - counts.pop())),
        ]
        for _run in denoised(pipeline, wanted, seed):
            pass
    for hook in hooks:
        hook.remove()
    return float(sum(counts))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pacing, "denoising_seconds", work)
    dit_pipeline().save_pretrained(tmp_path / "dit_pipeline")
    return tmp_path


def run(folder: Path, *options: object) -> Any:
    given = ["search", str(folder / "dit_pipeline"), "--steps", "6", "--samples", "2", "--guidance", "3", *map(str, options)]
    return CliRunner().invoke(cli.app, given)


def test_it_prints_a_table_and_writes_a_folder(folder: Path) -> None:
    done = run(folder, "--budget", "1.3x", "--only", "fora", "--only", "uniform_cache", "--only", "first_block", "-o", folder / "out")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert re.split(" {2,}", lines[0].strip()) == ["policy", "setting", "times faster", "error", "vs best", "calibration"]
    facts = json.loads((folder / "out" / "search.json").read_text())
    ranked = sorted([*facts["rows"], facts["fewer"]], key=lambda row: row["error"])
    assert [line.split("  ")[0] for line in lines[1:4]] == [row["policy"] for row in ranked]
    assert "first_block: first 1 and last 0 leave nothing of 1 blocks to be left out" in done.stdout
    assert f"dit_pipeline is {facts['rows'][0]['speedup']:.2f} times faster with {facts['rows'][0]['policy']}" in done.stdout
    assert lines[-2:] == [f"folder  {folder / 'out'}", f"report  {folder / 'out' / 'report.html'}"]
    assert facts["rows"][0]["speedup"] >= 1.3 * 0.98
    assert len(json.loads((folder / "out" / "aerogel.json").read_text())["policies"]) == 1

    (folder / "out" / "report.html").unlink()
    again = CliRunner().invoke(cli.app, ["report", str(folder / "out")])
    assert again.exit_code == 0, again.output
    assert "Aerogel search for feature caching" in (folder / "out" / "report.html").read_text()


def test_json_is_all_that_is_printed(folder: Path) -> None:
    done = run(folder, "--budget", "1.2", "--only", "fora", "--set", "fora.interval=3", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["rows"][0]["value"] == 3
    assert (facts["count"], facts["guidance"], len(facts["steps"]), facts["budget"]) == (2, 3.0, 6, 1.2)


def test_a_search_that_finds_nothing_fails_and_says_why(folder: Path) -> None:
    done = run(folder, "--budget", "50x", "--only", "fora", "-o", folder / "out")
    assert done.exit_code == 2
    assert "fora: it makes denoising" in done.stdout
    assert "No policy makes dit_pipeline 50 times faster." in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "error: No policy makes dit_pipeline 50 times faster; give a smaller --budget, or other methods (--only)"
    )
    assert (folder / "out" / "report.html").is_file()
    assert json.loads((folder / "out" / "aerogel.json").read_text())["policies"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "experts"), "'experts' is nothing that can be searched for; known are cache, skip"),
        (("--budget", "0.5x"), "budget '0.5x' is no speed-up"),
        (("--only", "rtn"), "rtn does not reuse anything"),
        (("--set", "rtn.scheme=W8A8"), "an option of 'rtn' is set, but that policy is not tried"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    done = run(folder, *options)
    assert done.exit_code == 2
    assert message in done.stderr


def test_experts_to_skip_are_searched_the_same_way(tmp_path: Path) -> None:
    words = text_file(tmp_path / "words.txt", 400)
    given = ["search", str(model_folder(tmp_path / "moe", "qwen3_moe")), "--task", "skip", "--budget", "50%", "--data", str(words)]
    given += ["--samples", "2", "--length", "24", "--only", "reduced_topk", "--only", "single_threshold"]
    done = CliRunner().invoke(cli.app, [*given, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert re.split(" {2,}", lines[0].strip()) == ["policy", "target", "skipped", "KL", "same token", "prefill", "decode"]
    facts = json.loads((tmp_path / "out" / "search.json").read_text())
    assert sum(line.startswith(("reduced_topk ", "single_threshold ")) for line in lines) == len(facts["rows"])
    assert "moe skips 50 % of its token-expert assignments with" in done.stdout.replace("\u202f", " ")
    assert CliRunner().invoke(cli.app, ["report", str(tmp_path / "out")]).exit_code == 0


def test_a_recipe_with_zeros_is_found_and_compress_runs_it(tmp_path: Path) -> None:
    model, words = model_folder(tmp_path / "model"), text_file(tmp_path / "words.txt", 400)
    given = ["search", str(model), "--task", "sparsity", "--data", str(words), "--samples", "4", "--length", "24"]
    done = CliRunner().invoke(cli.app, [*given, "--only", "magnitude", "--only", "erk", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert re.split(" {2,}", lines[0].strip()) == ["recipe", "zeros", "KL", "same token", "perplexity"]
    facts = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [re.split(" {2,}", line)[0] for line in lines[1:3]] == [row["name"] for row in facts["rows"]]
    assert f"model loses 50.0 % of its prunable weights with {facts['rows'][0]['name']}" in done.stdout.replace("\u202f", " ")
    assert lines[-1] == f"next    aerogel compress {model} --recipe {tmp_path / 'out' / 'recipe.yaml'} --output OUT"
    _, *command = lines[-1].removesuffix("OUT").removeprefix("next    ").split()
    done = CliRunner().invoke(cli.app, [*command, str(tmp_path / "pruned"), "--no-evaluate"])
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {name: 1 - int(tensors[f"{name}.weight"].count_nonzero()) / tensors[f"{name}.weight"].numel() for name in facts["layers"]} == (
        facts["rows"][0]["layers"]
    )


@pytest.mark.parametrize("budget", ["0", "1", "nan", "abc", "3:2"])
def test_zeros_that_cannot_be_are_refused_in_a_line(tmp_path: Path, budget: str) -> None:
    done = CliRunner().invoke(cli.app, ["search", str(tmp_path), "--task", "sparsity", "--budget", budget])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert f"error: budget '{budget}' says nothing about zeros; give their share between 0 and 1" in done.stderr


def test_zeros_of_a_denoiser_are_searched_by_its_own_images(folder: Path) -> None:
    options = ("--task", "sparsity", "--budget", "0.3", "--only", "magnitude", "--only", "wanda", "-o", folder / "out")
    done = CliRunner().invoke(cli.app, ["search", str(folder / "dit_pipeline"), "--steps", "2", "--samples", "2", *map(str, options)])
    assert done.exit_code == 0, done.output
    facts = json.loads((folder / "out" / "search.json").read_text())
    assert (facts["judged"], facts["figure"]) == ("outputs", "error")
    assert len(facts["rows"]) == 2
    assert (folder / "out" / "recipe.yaml").is_file()


def test_only_a_search_for_zeros_is_resumed(folder: Path) -> None:
    done = run(folder, "--resume", "-o", folder / "out")
    assert done.exit_code == 2
    assert "a search of weights that is saved to an output can be resumed (sparsity, structured); leave resume out" in done.stderr


def test_an_interrupted_search_for_zeros_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, made = sparsity.compress, list[str]()

    def compress(network: Any, recipe: Any, **options: Any) -> Any:
        made.append(recipe.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return own(network, recipe, **options)

    monkeypatch.setattr(sparsity, "compress", compress)
    model, words, out = model_folder(tmp_path / "model"), text_file(tmp_path / "words.txt", 400), tmp_path / "out"
    given = ["search", str(model), "--task", "sparsity", "--data", str(words), "--samples", "2", "--length", "24", "-o", str(out)]
    given += ["--only", "magnitude", "--only", "erk"]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 2
    told = f"interrupted; {tmp_path / 'out.partial'} keeps the recipes that were judged: add --resume to continue"
    assert done.stderr.splitlines()[-1] == f"error: {told}"
    done = CliRunner().invoke(cli.app, [*given, "--resume"])
    assert done.exit_code == 0, done.output
    assert [name.partition(" at ")[0] for name in made] == ["magnitude", "erk + magnitude", "erk + magnitude"]
