"""The README tells the truth: its Python runs, its commands and their options exist, its folders are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from aerogel.cli.commands import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.quality
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (code for code in blocks("python") if "import aerogel" in code)
    namespace: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    metrics = namespace["result"].metrics
    assert metrics["original"]["perplexity"]["perplexity"] < metrics["compressed"]["perplexity"]["perplexity"] < 40
    assert metrics["compressed"]["size"]["disk_bytes"] < 0.45 * metrics["original"]["size"]["disk_bytes"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "perplexity" in capsys.readouterr().out


def test_every_command_and_option_exists() -> None:
    known: Any = typer.main.get_command(app)
    lines = [shlex.split(line, comments=True) for code in blocks("sh") for line in code.splitlines() if line.startswith("aerogel ")]
    assert {line[1] for line in lines} == set(known.commands)
    for line in lines:
        options = {option for parameter in known.commands[line[1]].params for option in parameter.opts}
        assert {word for word in line if word.startswith("-")} <= options, line


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_every_folder_and_picture_is_there() -> None:
    folders = re.findall(r"^\| \d \| (.+?) \|", README, re.MULTILINE)
    named = [name for cell in folders for name in re.findall(r"`([^`]+)`", cell)] + re.findall(r"\]\(([\w/.-]+)\)", README)
    assert len(named) > 12
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert {f"aerogel/{path.name}/" for path in (ROOT / "aerogel").iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(named)
