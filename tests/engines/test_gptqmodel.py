"""Checkpoints that GPTQModel wrote, in the GPTQ and the AWQ layout, open as the weights that its own layers compute with, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from tests import tiny
from tests.engines.environments import ROOT, python_of, run
from tests.words import tokenizer

PACKAGES = (
    "transformers==5.23.0", "accelerate", "safetensors", "datasets", "numpy", "defuser", "device-smi", "logbar", "pypcre", "tokenicer",
    "threadpoolctl", "pillow", "requests",
)  # fmt: skip
SETTINGS = {
    "symmetric": ("gptq", "bits=4", "group_size=32", "sym=true", "desc_act=false"),
    "act-order": ("gptq", "bits=4", "group_size=32", "sym=true", "desc_act=true"),
    "asymmetric": ("gptq", "bits=4", "group_size=32", "sym=false", "desc_act=false"),
    "8-bits": ("gptq", "bits=8", "group_size=-1", "sym=true", "desc_act=true"),
    "3-bits": ("gptq", "bits=3", "group_size=32", "sym=true", "desc_act=true"),
    "awq": ("awq", "bits=4", "group_size=32", "sym=false"),
}


def model() -> nn.Module:
    """A tiny Llama in float16 whose layers all have 64 outputs or twice as many, as its search for AWQ's clips expects."""
    module = tiny._language("Llama", num_key_value_heads=tiny.HEADS)
    tiny.fill(module, torch.Generator().manual_seed(0))
    return module.half()


@pytest.mark.engine
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_it_wrote_opens_as_its_own_weights(settings: str, tmp_path: Path) -> None:
    python = python_of("gptqmodel", *PACKAGES, bare=("gptqmodel==7.7.*",))
    original = model()
    original.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    method, *options = SETTINGS[settings]
    driver, weights = ROOT / "tests" / "engines" / "gptqmodel_driver.py", tmp_path / "weights.safetensors"
    given = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
    run(python, driver, method, tmp_path / "model", tmp_path / "quantized", weights, *options, **given)
    theirs = load_file(weights)
    assert len(theirs) == 2 * 7
    ours = open_model(tmp_path / "quantized", lazy=False, dtype=torch.float16).module
    for name, weight_OI in theirs.items():
        assert torch.equal(ours.get_parameter(name), weight_OI), name
        assert not torch.equal(original.get_parameter(name), weight_OI), name
    assert (
        plan(tmp_path / "quantized", "rtn-w4a16", flops_a_second=lambda: 1e9).remarks[0].startswith(f"the source is quantized ({method}:")
    )
    aerogel.compress(tmp_path / "quantized", "fp8-dynamic", output=tmp_path / "out", measures=())
