"""Compressed architectures open with transformers, diffusers and aerogel, and answer as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.architectures.cases import NOT_BUILT, SAMPLE, Case, cases, output
from tests.architectures.through import RECIPES, TOLERANCE, difference, open_with_library, through

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "causal-llama",
        "causal-qwen3_moe",
        "image-text-qwen2_5_vl",
        "denoiser-SD3Transformer2DModel",
        "denoiser-WanTransformer3DModel",  # has a parameter of its own, which no layer owns
    ],
)
def test_answers_as_in_memory(name: str) -> None:
    row = through(CASES[name], RECIPES["rtn"])
    assert (row.stage, row.reason) == ("same", "")
    assert row.share > 0.8
    assert "lm_head.weight" in row.left or row.kind == "denoiser"
    assert 0.01 < row.change < 1
    assert max(row.library, row.loaded) < 1e-5


def test_an_error_is_the_reason_of_its_stage() -> None:
    def fails() -> nn.Module:
        raise ImportError("no package of\nthat name")

    row = through(Case("causal", "none", fails, lambda module: []), RECIPES["rtn"])
    assert (row.stage, row.reason) == ("build", "ImportError: no package of that name")
    row = through(CASES["causal-llama"], {"steps": [{"rtn": {"scheme": "W4A16_G128"}}]})
    assert row.stage == "compress"
    assert "do not divide into groups of 128" in row.reason
