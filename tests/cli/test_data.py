"""`--data` and `--column` of the commands: the same weights from every format, and what is wrong in one line before work starts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from aerogel.cli import commands as cli
from tests.folders import digests, model_folder, text_file


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recipe, and the same documents in several formats."""
    folder = tmp_path_factory.mktemp("desk")
    words = text_file(folder / "words.txt", 4000).read_text()
    documents = [words[start : start + 500] for start in range(0, len(words), 500)]
    (folder / "documents.txt").write_text("\f".join(documents))
    rows = [{"id": str(number), "body": document, "note": "the"} for number, document in enumerate(documents)]
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (folder / "rows").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "rows" / "train-00000-of-00001.parquet")
    (folder / "own.yaml").write_text("steps:\n  - gptq: {scheme: W4A16_G32}\n")
    model_folder(folder / "model")
    return folder


def invoke(*words: object) -> Any:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(cli.app, [str(word) for word in words])
    finally:
        torch.set_num_threads(threads)


def compressed(desk: Path, output: Path, *options: object) -> Any:
    given = ("-r", desk / "own.yaml", "-o", output, "--samples", 6, "--length", 24, "--no-evaluate", "--json", *options)
    result = invoke("compress", desk / "model", *given)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    line = str(result.stderr).removesuffix("\n")
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_every_format_gives_the_same_weights(desk: Path, tmp_path: Path) -> None:
    plain = compressed(desk, tmp_path / "plain", "--data", desk / "documents.txt")
    for name in ("rows.jsonl.gz", "rows"):
        other = compressed(desk, tmp_path / name, "--data", desk / name, "--column", "body")
        assert digests(tmp_path / name)["model.safetensors"] == digests(tmp_path / "plain")["model.safetensors"]
        ours, theirs = (made["provenance"]["calibration"] for made in (other, plain))
        assert ours == {**theirs, "source": str(desk / name), "column": "body"}


def test_a_recorded_run_names_its_column(desk: Path, tmp_path: Path) -> None:
    made = compressed(desk, tmp_path / "out", "--data", desk / "rows", "--column", "body", "--samples", 3)
    (tmp_path / "run.yaml").write_text(invoke("show", tmp_path / "out", "--recipe").stdout)
    assert "column: body" in (tmp_path / "run.yaml").read_text()
    again = invoke("compress", "-r", tmp_path / "run.yaml", "-o", tmp_path / "again", "--no-evaluate", "--json")
    assert json.loads(again.stdout)["provenance"]["calibration"] == made["provenance"]["calibration"]
    # Another source on the command line is read by its own columns.
    assert "could be read" not in invoke("plan", "-r", tmp_path / "run.yaml", "--data", desk / "documents.txt", "--json").output


def test_a_plan_says_which_columns_are_read(desk: Path, tmp_path: Path) -> None:
    plan = ("plan", desk / "model", "-r", desk / "own.yaml", "--samples", 4, "--length", 24, "--json", "--data")
    (tmp_path / "asked.jsonl").write_text('{"question": "the war", "answer": "peace of the world", "id": 5}\n' * 40)
    for options, remark in {
        (tmp_path / "asked.jsonl",): [f"calibration reads question and answer of {tmp_path / 'asked.jsonl'}"],
        (desk / "rows", "--column", "body"): [f"calibration reads body of {desk / 'rows'}"],
        (desk / "documents.txt",): [],
    }.items():
        assert json.loads(invoke(*plan, *options).stdout)["remarks"] == remark


def test_what_cannot_be_read_is_one_line_before_work(desk: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"text\nthe\nth\xe9\n")
    plan = ("plan", desk / "model", "-r", desk / "own.yaml", "--data")
    for options, complaint in {
        (desk / "rows",): "row 0 has no text that is found by its name; its columns are id, body, note: name one",
        (desk / "rows", "--column", "text"): "row 0 has no column 'text'; its columns are id, body, note",
        (tmp_path / "latin.csv",): "latin.csv line 3 is not UTF-8 text (byte 0xe9)",
        (tmp_path / "pipe.jsonl",): "is no regular file",
        (desk / "model",): "is the folder of a model, not of data",
        ("",): "the name of the text source is empty",
        ("sotu", "--column", "text"): "is plain text without columns",
        ("needles:0",): "'needles:0' does not say how many numbers are hidden: give needles, or needles:1 to needles:196",
        ("needles", "--length", 200): "needles:1: a prompt of 200 tokens and its answer do not fit the 128 positions of this model",
    }.items():
        assert complaint in refused(*plan, *options)
    compress = ("compress", desk / "model", "-r", desk / "own.yaml", "-o", tmp_path / "out", "--data", tmp_path / "latin.csv")
    assert "latin.csv line 3" in refused(*compress)
    assert not (tmp_path / "out").exists()


def test_evaluate_reads_what_it_is_given(desk: Path) -> None:
    def perplexity(*options: object) -> Any:
        result = invoke("evaluate", desk / "model", "--measure", "perplexity", "--json", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["original"]["perplexity"]

    plain = perplexity("--data", desk / "documents.txt")
    assert perplexity("--data", desk / "rows", "--column", "body") == {**plain, "source": str(desk / "rows")}
    assert perplexity("--set", f"perplexity.source={desk / 'documents.txt'}") == plain
    assert perplexity("--set", f"perplexity.source={desk / 'rows'}", "--set", "perplexity.column=body")["perplexity"] == plain["perplexity"]
    options = ("--measure", "size", "--data", desk / "documents.txt")
    assert "would be read by none of the measures" in refused("evaluate", desk / "model", *options)
    assert "row 0 has no text" in refused("evaluate", desk / "model", "--data", desk / "rows")


def test_a_search_reads_a_column(desk: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "moe", "qwen3_moe")
    search = (
        "search",
        model,
        "--task",
        "skip",
        "--only",
        "reduced_topk",
        "--samples",
        2,
        "--length",
        24,
        "--data",
        desk / "rows",
        "--json",
    )
    assert "row 0 has no text" in refused(*search)
    result = invoke(*search, "--column", "body")
    assert json.loads(result.stdout)["provenance"]["calibration"]["column"] == "body"
