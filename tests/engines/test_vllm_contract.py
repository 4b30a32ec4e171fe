"""The table of what vLLM opens on a CPU is what its CPU build says of every scheme."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from aerogel.io.engines import ENGINES, StoredLayer
from aerogel.io.quantized import describe
from aerogel.layers.linear import QuantLinear
from aerogel.layers.replacement import Assigned
from aerogel.numerics.scheme import Scheme
from tests.engines.environments import python_of, run
from tests.engines.processor import present
from tests.engines.test_vllm import BROKEN, RELEASE, SETTINGS
from tests.io.test_engines import OPENS

SIZES = [(256, 384), (256, 80), (144, 64)]


@pytest.mark.engine
def test_the_cpu_build_agrees(tmp_path: Path) -> None:
    asked, expected = {}, {}
    for name in OPENS:
        for inputs, outputs in SIZES:
            scheme = Scheme.parse(name)
            if (scheme.group and inputs % scheme.group) or (name == "FP8_BLOCK" and (inputs, outputs) != SIZES[0]):
                continue
            linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
            config = describe(nn.Sequential(QuantLinear.rebuild(linear, {}, Assigned(scheme))))
            asked[f"{name} {inputs} x {outputs}"] = (config, inputs, outputs)
            layer, engine = StoredLayer(scheme, inputs, outputs), ENGINES["vllm-cpu"]
            expected[f"{name} {inputs} x {outputs}"] = engine.refuses(layer) is None and engine.needs(layer) <= present()
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    driver = Path(__file__).parent / "vllm_contract_driver.py"
    run(python_of("vllm", RELEASE, without=BROKEN), driver, tmp_path / "asked.json", tmp_path / "answered.json", **SETTINGS)
    answered = json.loads((tmp_path / "answered.json").read_text())
    assert {name: reason is None for name, reason in answered.items()} == expected, answered
