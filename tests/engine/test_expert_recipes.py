"""The recipes for MoE models do their whole job on the zoo's vision-language MoE model, from a folder with chats to a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import aerogel
from aerogel.data import chats
from aerogel.engine.calibration import CalibrationRequest
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.layers.linear import QuantLinear
from tests.questions import ZOO, written
from tests.tiny import output

SOURCE = ZOO / "fashion-vlm"
OPTIONS = ["modes.points=8", "modes.ratio=0.5", "modes.power=[0.25, 1]"]


RECIPES = {"modes": OPTIONS, "modes-w4a16": [*OPTIONS, "rtn.scheme=W4A16_G32"]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    source = written(tmp_path, 12)
    measures = [ExactMatch(source=str(source), count=6, new_tokens=40)]
    result = aerogel.compress(
        SOURCE,
        recipe,
        overrides=RECIPES[recipe],
        samples=CalibrationRequest(source=str(source), count=8),
        output=tmp_path / "out",
        measures=measures,
    )
    skipped = result.metrics["compressed"]["exact_match"]["skipped"]
    assert 0 < skipped["decode"] < skipped["prefill"] < 0.7
    assert len(skipped["layers"]) == 6
    page = result.report().read_text()
    assert "Skipped experts" in page
    reopened = aerogel.load(tmp_path / "out", lazy=False)
    (call,) = chats.calls(chats.read(source)[:3], reopened.processor, padded=True)
    with aerogel.skipping(result.network, result):
        assert torch.equal(output(reopened.module, call), output(result.network.module, call))
    coded = [part for part in reopened.module.modules() if isinstance(part, QuantLinear)]
    assert (len(coded) > 6 * 16 * 3) == (recipe == "modes-w4a16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_vl_moe"
    if not coded:  # and plain transformers opens the weights, whole and as they were
        theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        original = aerogel.load(SOURCE, lazy=False, dtype=torch.float32)  # by itself float16 on processors that compute in it
        torch.testing.assert_close(output(theirs.float().eval(), call), output(original.module, call), rtol=0, atol=1e-4)
