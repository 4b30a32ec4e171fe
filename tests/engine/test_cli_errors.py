"""Bad days: each gives one clear line and exit code 2, and leaves the user's files as they were."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aerogel.cli import commands as cli
from aerogel.engine import resume
from tests.folders import digests, model_folder, text_file

RECIPE = "steps:\n  - gptq: {scheme: W4A16_G32}\n"


class Desk:
    """A user's folder with a model, a text and a recipe, at a command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.text, self.recipe, self.output = (folder / name for name in ("model", "text.txt", "own.yaml", "out"))

    def compress(self, *options: str) -> list[str]:
        """The command that compresses the model; later options win."""
        given = ["--recipe", str(self.recipe), "--output", str(self.output), "--data", str(self.text)]
        return ["compress", str(self.model), *given, "--samples", "6", "--length", "24", "--no-evaluate", *options]

    def run(self, *command: str) -> Any:
        return CliRunner().invoke(cli.app, list(command))

    def refused(self, *command: str) -> str:
        """Run a command that must fail; returns its one line."""
        before = digests(self.folder)
        result = self.run(*command)
        assert result.exit_code == 2, result.output
        line = result.stderr.removesuffix("\n")
        assert line.startswith("error: ")
        assert "\n" not in line
        assert digests(self.folder) == before
        assert not (self.folder / "out.partial").exists()
        return line


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    text_file(folder / "text.txt")
    (folder / "own.yaml").write_text(RECIPE)
    model_folder(folder / "model", num_hidden_layers=3, max_shard_size="200KB")
    return folder


@pytest.fixture
def desk(shelf: Path, tmp_path: Path) -> Desk:
    return Desk(Path(shutil.copytree(shelf, tmp_path / "desk")))


def shard(desk: Desk, number: int = 1) -> Path:
    return sorted(desk.model.glob("*.safetensors"))[number]


def test_unknown_recipe(desk: Desk) -> None:
    assert "unknown recipe 'gptq-w4a15'; did you mean gptq-w4a16" in desk.refused(*desk.compress("--recipe", "gptq-w4a15"))
    assert "recipe file none.yaml does not exist" in desk.refused("plan", str(desk.model), "-r", "none.yaml")


def test_unknown_recipe_key(desk: Desk) -> None:
    assert "step 1 (gptq): unknown option 'shceme'; did you mean scheme" in desk.refused(*desk.compress("--set", "gptq.shceme=W3A16"))
    desk.recipe.write_text("steps:\n  - gptq: {perc_damp: 0.1}\n")
    assert "unknown option 'perc_damp'; did you mean percdamp" in desk.refused("plan", str(desk.model), "-r", str(desk.recipe))


def test_unknown_method(desk: Desk) -> None:
    desk.recipe.write_text("steps:\n  - gptqq: {}\n")
    assert "unknown method 'gptqq'; did you mean gptq" in desk.refused(*desk.compress())


def test_unknown_scheme(desk: Desk) -> None:
    assert "option 'scheme': unknown scheme 'W4A17'" in desk.refused(*desk.compress("--set", "gptq.scheme=W4A17"))


def test_unknown_format(desk: Desk) -> None:
    assert desk.run(*desk.compress()).exit_code == 0
    line = desk.refused("export", str(desk.output), "--format", "gguff", "--output", str(desk.folder / "exported"))
    assert "unknown exporter 'gguff'; did you mean gguf" in line


def test_a_type_that_transformers_does_not_know(desk: Desk) -> None:
    config = desk.model / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"lama"'))
    assert re.search(r"config\.json: transformers \S+ has no such model .*lama.*; upgrade transformers", desk.refused(*desk.compress()))


def test_unknown_model(desk: Desk) -> None:
    assert "is no folder" in desk.refused("plan", "smollm-135", "-r", str(desk.recipe))


def test_a_pattern_that_matches_nothing(desk: Desk) -> None:
    assert "gptq: no layer matches '*.o_prj' in ignore; did you mean *.o_proj" in desk.refused(*desk.compress("--ignore", "*.o_prj"))
    assert "is a module with layers in it: write '*.self_attn.*' for those" in desk.refused(*desk.compress("--targets", "self_attn"))
    assert "pattern 're:(' is not a regular expression" in desk.refused(*desk.compress("--ignore", "re:("))


def test_a_scheme_for_steps_that_differ_on_purpose(desk: Desk) -> None:
    desk.recipe.write_text("steps:\n  - rtn: {scheme: W8A16, targets: ['*.mlp.*']}\n  - gptq: {scheme: W4A16_G32}\n")
    assert "have their own scheme (rtn W8A16, gptq W4A16_G32), so --scheme is ambiguous" in desk.refused(
        *desk.compress("--scheme", "W4A16")
    )


def test_a_recipe_file_with_a_wrong_key(desk: Desk) -> None:
    desk.recipe.write_text(f"{RECIPE}data: {{lenght: 12}}\n")
    assert "own.yaml, data: unknown key 'lenght'; did you mean length" in desk.refused(*desk.compress())
    desk.recipe.write_text(f"{RECIPE}model: {desk.model}\noutptu: out\n")
    assert "own.yaml: unknown key 'outptu'; did you mean output" in desk.refused(*desk.compress())


def test_a_model_that_only_the_hub_could_have(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk.folder / "cache"))
    given = ("--recipe", str(desk.recipe))
    assert "and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE to download it" in desk.refused("plan", "owner/model", *given)
    assert "leave --revision out" in desk.refused(*desk.compress("--revision", "main"))


def test_a_name_that_cannot_be_pushed(desk: Desk) -> None:
    assert "'mine' is no name for a model on the hub" in desk.refused(*desk.compress("--push-to-hub", "mine"))
    assert "has no aerogel.json" in desk.refused("push", str(desk.model), "me/mine")


def test_unknown_measure_and_name(desk: Desk) -> None:
    assert "unknown measure 'perplexty'; did you mean perplexity" in desk.refused("evaluate", str(desk.model), "--measure", "perplexty")
    assert "nothing is called 'gptqq'; did you mean gptq" in desk.refused("show", "gptqq")


def test_text_shorter_than_one_sequence(desk: Desk) -> None:
    desk.text.write_text("the people of the world")
    line = desk.refused(*desk.compress())
    assert "has 6 tokens, one sequence needs 24; give more text or a shorter length" in line


def test_text_that_is_not_there(desk: Desk) -> None:
    assert "no text source" in desk.refused(*desk.compress("--data", str(desk.folder / "none.txt")))


def test_weights_that_are_no_numbers(desk: Desk) -> None:
    tensors = load_file(shard(desk))
    name = sorted(tensors)[0]
    tensors[name].flatten()[7] = torch.nan
    save_file(tensors, shard(desk), metadata={"format": "pt"})
    line = desk.refused(*desk.compress())
    assert f"{shard(desk)}: {name} holds NaN or infinity" in line


def test_missing_shard(desk: Desk) -> None:
    path = shard(desk)
    path.unlink()
    assert f"{path}: this shard is missing" in desk.refused(*desk.compress())


def test_truncated_shard(desk: Desk) -> None:
    path = shard(desk)
    path.write_bytes(path.read_bytes()[:-1000])
    assert re.search(rf"{re.escape(str(path))}: has \d+ bytes where its header promises \d+", desk.refused(*desk.compress()))


def test_a_group_that_does_not_divide(desk: Desk) -> None:
    expected = "model.layers.0.self_attn.q_proj and 17 other linear layers cannot take W4A16_G48: 64 inputs do not divide"
    planned = desk.run("plan", str(desk.model), "-r", str(desk.recipe), "--set", "gptq.scheme=W4A16_G48")
    assert planned.exit_code == 2
    assert planned.stderr.startswith(f"error: {expected}")
    line = desk.refused(*desk.compress("--set", "gptq.scheme=W4A16_G48"))
    assert expected in line
    assert "(groups that fit: 32, 64)" in line


def test_an_exporter_that_cannot_express_the_scheme(desk: Desk) -> None:
    desk.recipe.write_text("steps:\n  - gptq: {scheme: W8A8}\n")
    assert desk.run(*desk.compress()).exit_code == 0
    line = desk.refused("export", str(desk.output), "--format", "gptq", "--output", str(desk.folder / "exported"))
    assert "cannot be written as GptqLayout: model.layers.0" in line
    assert not (desk.folder / "exported").exists()


def test_an_output_that_is_there(desk: Desk) -> None:
    desk.output.mkdir()
    (desk.output / "mine.txt").write_text("mine")
    assert "this folder exists and is not empty; remove it or give another name" in desk.refused(*desk.compress())


def test_an_output_that_cannot_be_written(desk: Desk) -> None:
    assert re.search(r"text\.txt: cannot write here|cannot write", desk.refused(*desk.compress("--output", str(desk.text / "out"))))
    if Path("/proc/self").exists():
        assert "cannot write here" in desk.refused(*desk.compress("--output", "/proc/self/out"))


@pytest.mark.parametrize("output", ["/", ".", ""])
def test_an_output_without_a_name(output: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.model)
    assert "this folder exists and is not empty" in desk.refused(*desk.compress("--output", output))
    assert "this folder exists and is not empty" in desk.refused("export", str(desk.model), "--format", "gptq", "--output", output)


def test_a_batch_that_no_machine_has_room_for(desk: Desk) -> None:
    said = desk.refused("bench", str(desk.model), "--batch", str(10**9))
    assert "option 'batch': expected a number from 1 to 65,536, got 1000000000" in said
    assert "--batch-size 1000000000 is neither auto nor a whole number from 1 to 1,000,000" in desk.refused(
        *desk.compress("--batch-size", str(10**9))
    )


def test_an_output_inside_the_model(desk: Desk) -> None:
    assert "lies in the folder the model comes from" in desk.refused(*desk.compress("--output", str(desk.model / "out")))


def test_too_little_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert re.search(r"0\.0 GB free, about 0\.1 GB needed; free disk space or give another folder", desk.refused(*desk.compress()))


def test_a_disk_that_fills_up_while_saving_keeps_the_calibration(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(desk.model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(desk.output))

    with monkeypatch.context() as patch:
        patch.setattr("aerogel.io.save.write_shards", full)
        result = desk.run(*desk.compress())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {desk.output}: could not be saved (No space left on device)")
    assert not desk.output.exists()
    assert digests(desk.model) == before
    result = desk.run(*desk.compress("--resume", "--dtype", "bfloat16"))
    assert result.exit_code == 2
    assert 'out.partial was started with another dtype (null, now "bfloat16"); give the same dtype to resume' in result.stderr
    assert desk.run(*desk.compress("--resume")).exit_code == 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "activations"), "activations: No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("written", ["aerogel.engine.resume.save_file", "aerogel.model.activations.save_file"])
def test_a_disk_that_fills_up_while_compressing(
    error: Exception, told: str, written: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(written, Mock(side_effect=error))
        result = desk.run(*desk.compress())
    kept = f"{desk.output}.partial keeps the finished blocks: add --resume to continue once that is fixed"
    assert (result.exit_code, result.stderr) == (2, f"error: the run stopped ({told}); {kept}\n")
    assert desk.run(*desk.compress("--resume")).exit_code == 0


def test_a_disk_that_is_full_when_the_report_is_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.run(*desk.compress()).exit_code == 0
    before, usual = digests(desk.output), Path.write_text

    def full(path: Path, text: str, *args: Any) -> None:
        usual(path, text[:10], *args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        result = desk.run("report", str(desk.output))
    place = desk.output / "report.html"
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {place} could not be written (No space left on device); free disk space, or give another place\n",
    )
    assert digests(desk.output) == before


@pytest.mark.parametrize("name", ["run.json", "stage-0/walk.json", "stage-0/blocks/model.layers.0/block.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_progress_folder_that_is_damaged(name: str, text: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("aerogel.io.save.write_shards", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        assert desk.run(*desk.compress()).exit_code == 2
    (desk.folder / "out.partial" / name).write_text(text)
    result = desk.run(*desk.compress("--resume"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "out.partial" in result.stderr


def test_an_unfinished_run(desk: Desk) -> None:
    (desk.folder / "out.partial").mkdir()
    (desk.folder / "out.partial" / "run.json").write_text("{}")
    result = desk.run(*desk.compress())
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "out.partial holds an unfinished run; add --resume to resume it, or remove the folder to start again" in result.stderr
    result = desk.run(*desk.compress("--resume"))
    assert result.exit_code == 2
    assert "was started with another model" in result.stderr


@pytest.fixture
def moe_model(desk: Desk) -> Desk:
    """An MoE model whose router sends no token to the last expert of the first block."""
    shutil.rmtree(desk.model)
    model_folder(desk.model, "qwen3_moe")
    path = desk.model / "model.safetensors"
    tensors = load_file(path)
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[-1] = gate[:-1].mean(0)  # a score that is never the highest
    save_file(tensors, path, metadata={"format": "pt"})
    return desk


def test_a_linear_that_no_token_reached_is_rounded_and_reported(moe_model: Desk) -> None:
    config = moe_model.model / "config.json"
    settings = json.loads(config.read_text()) | {"num_experts_per_tok": 1}
    config.write_text(json.dumps(settings))
    result = moe_model.run(*moe_model.compress())
    assert result.exit_code == 0, result.output
    journal = json.loads((moe_model.output / "aerogel.json").read_text())["journal"]
    fallen = {line["name"] for line in journal if line.get("fallback")}
    unseen = "model.layers.0.mlp.experts.3"
    assert {f"{unseen}.{part}_proj" for part in ("gate", "up", "down")} <= fallen
    assert f"warning: {unseen}.gate_proj and" in result.stderr
    assert "no token reached it" in result.stderr


def interrupted(command: list[str], ready: Callable[[], bool], number: int = signal.SIGINT) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and press Ctrl-C, or send another signal, when it is ready for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aerogel", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have jobs in the background ignore it
    )
    try:
        while not ready() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_what_is_finished(number: int, desk: Desk) -> None:
    before = digests(desk.model)
    first = desk.folder / "out.partial" / "stage-0" / "blocks" / "model.layers.0" / resume.JOURNAL
    long = desk.compress("--samples", "64", "--set", "gptq.true_sequential=true")
    ended = interrupted(long, first.exists, number)
    assert ended.returncode == 2, ended.stderr
    assert (
        ended.stderr.strip().splitlines()[-1]
        == f"error: interrupted; {desk.folder}/out.partial keeps the finished blocks: add --resume to continue"
    )
    assert "Traceback" not in ended.stderr
    assert not desk.output.exists()
    assert digests(desk.model) == before
    assert desk.run(*long, "--resume").exit_code == 0


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Commands set torch's threads; tests leave them as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
