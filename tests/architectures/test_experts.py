"""Experts one by one answer as fused ones, in every architecture that has some; what would not stays fused."""

from __future__ import annotations

import pytest

from aerogel.io.names import Names
from aerogel.layers.experts import ExpertList
from aerogel.model.experts import unfuse
from tests.architectures.cases import NOT_BUILT, SAMPLE, cases, output
from tests.architectures.through import difference

CASES = {str(case): case for case in cases() if case.kind != "denoiser" and str(case) not in NOT_BUILT}
ALSO = {"image-text-muse_spark", "causal-nemotron_h", "causal-aria_text", "causal-inkling_text"}
"""Cases of the default run that hold experts otherwise than those of the sample: with a norm behind each, without a gate, transposed."""
FUSED = {"causal-jetmoe", "causal-longcat_flash", "image-text-muse_spark"}
"""Cases some of whose experts stay fused: their parameters are laid out, or followed, in a way that single experts are not."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SAMPLE.keys() | ALSO else pytest.mark.slow) for name in CASES])
def test_answers_are_those_of_fused_experts(name: str) -> None:
    case = CASES[name]
    module = case.make()
    calls = case.calls(module)
    before = [output(module, call) for call in calls]
    unfused = unfuse(module, Names.of(module).experts)
    if unfused:
        assert all(isinstance(module.get_submodule(experts), ExpertList) for experts in unfused)
        assert difference([output(module, call) for call in calls], before) < 1e-5
    left = [key for key, weight in module.named_parameters() if weight.ndim == 3 and ".experts." in key and len(weight) > 1]
    assert bool(left) == (name in FUSED), left
