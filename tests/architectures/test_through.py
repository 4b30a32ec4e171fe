"""Compressed architectures open with transformers, diffusers and aerogel, and answer as in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import nn

from tests.architectures.cases import NOT_BUILT, SAMPLE, Case, cases, output
from tests.architectures.through import RECIPES, TOLERANCE, difference, open_with_library, rows, through

CASES = {str(case): case for case in cases()}
NOT_OPENED = {"image-text-shieldgemma2"}
"""Types whose own checkpoints transformers 5.23 does not open: it gives the weights names that its class does not have."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CASES if name not in NOT_OPENED | NOT_BUILT.keys()],
)
def test_the_library_opens_what_it_saves(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.make()
    calls = case.calls(module)
    module.save_pretrained(tmp_path)
    opened = open_with_library(case, tmp_path)
    assert difference([output(opened, call) for call in calls], [output(module, call) for call in calls]) < TOLERANCE


REGISTERED_ONLY = {
    "causal-gpt2": "ignore_mismatched_sizes",  # it knows no quantized Conv1D, and refuses the empty weight
    "causal-gpt_oss": "missing_keys",  # their checkpoints hold fused experts, and transformers has no converter from single ones
    **dict.fromkeys(("causal-mamba", "causal-mamba2", "causal-rwkv"), "no attribute 'weight'"),  # their _init_weights reads packed layers
}
"""Types of the sample that transformers 5.23 opens after `aerogel.register_transformers()` only."""
SHARE = {
    "causal-qwen3_next": 0.98, "causal-mamba": 0.94, "causal-jamba": 0.97, "image-text-florence2": 0.98,
    "denoiser-UNet2DConditionModel": 0.39,
}  # fmt: skip
"""Part of the weights in blocks that is quantized where it is below 99 %: A_log multiplies no matrix, convolutions are not
targeted, gates of DeltaNet stay in 16 bits."""


LARGE = ("causal-qwen3_next", "causal-llama4_text", "causal-falcon_h1", "causal-deepseek_v3")
"""Those of the sample that take longest."""
CALIBRATED = ("causal-llama", "causal-qwen3_moe", "image-text-qwen2_5_vl", "denoiser-UNet2DConditionModel")
"""Those that a method which reads activations is tried on in the usual run."""


def _is_usual(name: str, method: str) -> bool:
    return name in CALIBRATED or (method == "rtn" and name not in LARGE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if _is_usual(name, method) else pytest.mark.slow)
        for name in SAMPLE
        for method in ("rtn", "gptq")
    ],
)
def test_answers_as_in_memory(name: str, method: str) -> None:
    row = through(CASES[name], RECIPES[method])
    assert row.stage == ("open" if name in REGISTERED_ONLY else "same"), row.reason
    assert REGISTERED_ONLY.get(name, "") in row.reason
    assert row.share >= SHARE.get(name, 0.99), row.left
    assert 0.01 < row.change < 1
    assert max(row.library, row.registered, row.loaded) < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_most_types_answer_as_in_memory() -> None:
    """By itself transformers 5.23 opens neither single experts of fused checkpoints nor packed layers that its `_init_weights` reads."""
    found = list(rows([case for case in CASES.values() if str(case) not in NOT_BUILT], RECIPES["gptq"]))
    by_itself = Counter(row.kind for row in found if row.stage == "same")
    registered = Counter(row.kind for row in found if row.stage in ("open", "same"))
    assert by_itself["causal"] >= 150
    assert registered["causal"] >= 175
    assert by_itself["image-text"] >= 65
    assert registered["image-text"] >= 75
    assert registered["denoiser"] >= 80
    assert not [row for row in found if row.stage == "compress" and row.kind == "causal" and row.name != "diffusion_gemma"]


def test_an_error_is_the_reason_of_its_stage() -> None:
    def fails() -> nn.Module:
        raise ImportError("no package of\nthat name")

    row = through(Case("causal", "none", fails, lambda module: []), RECIPES["rtn"])
    assert (row.stage, row.reason) == ("build", "ImportError: no package of that name")
    row = through(CASES["causal-llama"], {"steps": [{"rtn": {"scheme": "W4A16_G128"}}]})
    assert row.stage == "compress"
    assert "do not divide into groups of 128" in row.reason
