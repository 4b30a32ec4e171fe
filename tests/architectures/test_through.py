"""Compressed architectures open with transformers, diffusers and aerogel, and answer as in memory."""

from __future__ import annotations

import pytest
from torch import nn

from tests.architectures.cases import Case, cases
from tests.architectures.through import RECIPES, through

CASES = {str(case): case for case in cases()}


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
