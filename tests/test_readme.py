"""The README tells the truth: its Python runs, its commands and their options exist, its folders are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer

from aerogel import catalog
from aerogel.cli.commands import app
from aerogel.io import reference

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 64
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_example(model: str) -> dict[str, Any]:
    """Run the README's Python example, in the current folder, with another model."""
    (example,) = (code for code in blocks("python") if "import aerogel" in code)
    assert example.count('"smollm2-135m"') == 1
    namespace: dict[str, Any] = {}
    exec(compile(example.replace('"smollm2-135m"', repr(model)), "README.md", "exec"), namespace)
    metrics: dict[str, Any] = namespace["result"].metrics
    return metrics


def narrow_model(folder: Path) -> str:
    """Save a model of two narrow layers with random weights, which reads text with the tokenizer of the reference model."""
    source = reference.folder_of("smollm2-135m")
    config = transformers.AutoConfig.from_pretrained(source)
    for name, value in {"num_hidden_layers": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 16}.items():
        setattr(config, name, value)
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = narrow_model(tmp_path / "model")
    metrics = run_example(model)
    assert 0 < metrics["compressed"]["kl_divergence"]["kl"] < 0.5
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config
    assert saved.quantization_config.config_groups["group_0"].weights.num_bits == 4
    layers = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 2 * WIDTH)  # all but the embedding and the norms
    saving = metrics["original"]["size"]["disk_bytes"] - metrics["compressed"]["size"]["disk_bytes"]
    assert 1.4 * layers < saving < 1.5 * layers, "of 16 bits a weight 4 and a scale for each group stay"
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.quality
def test_the_python_example_keeps_the_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = run_example("smollm2-135m")
    assert metrics["original"]["perplexity"]["perplexity"] < metrics["compressed"]["perplexity"]["perplexity"] < 40
    assert metrics["compressed"]["size"]["disk_bytes"] < 0.45 * metrics["original"]["size"]["disk_bytes"]


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


def paths_of_the_tree() -> list[str]:
    """Paths in the annotated file tree, with their parents."""
    (tree,) = blocks("text")
    parents: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.append("".join(parents))
    return paths


def test_every_folder_of_the_tree_is_there_and_none_is_missing() -> None:
    tree = paths_of_the_tree()
    assert [path for path in tree if not (ROOT / path).exists()] == []
    present = {f"{path.relative_to(ROOT)}/" for path in (ROOT / "aerogel").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert present <= set(tree)


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(((?!https?:)[\w/.-]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 40
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_methods_of_the_table_exist() -> None:
    """A new method needs no edit of the README, so methods may be missing from its table."""
    linked = set(re.findall(r"\]\(docs/methods/(\w+)\.md\)", README)) - {"index"}
    assert len(linked) > 30
    assert linked <= set(catalog.names("methods"))
