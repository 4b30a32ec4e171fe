"""Folders that an earlier release wrote: they open, with their policies on, and answer as they did then.

tests/fixtures/before_layers was written by the commit before the layers runtime/, layers/ and io/ existed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aerogel
from aerogel.engine import policies
from aerogel.report import record
from tests.tiny import FAMILIES, output

# The outputs in the fixtures were computed by the kernels of a CPU, not by their references, which round otherwise.
pytestmark = pytest.mark.usefixtures("kernels_by_time")

FOLDERS = Path(__file__).parent.parent / "fixtures/before_layers"
POLICIES = {
    "language": [],
    "experts": ["reduced_topk"],
    "denoiser": ["attention_quant", "uniform_cache"],
    "unet": ["temporal_cache"],
}


@pytest.mark.parametrize(("name", "tiny"), [("language", "llama"), ("experts", "qwen3_moe")])
def test_older_language_models_give_the_same_logits(name: str, tiny: str) -> None:
    network, saved = aerogel.load(FOLDERS / name, lazy=False), load_file(FOLDERS / f"{name}.safetensors")
    (call,) = FAMILIES[tiny].calls(1)
    for key, value in call.kwargs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, saved[f"0.{key}"]), "the inputs of today's tests are those of then"
    torch.testing.assert_close(output(network.module, call), saved["0.output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "asked"), [("denoiser", {"class_labels": [0, 7]}), ("unet", {"batch_size": 2})])
def test_older_denoisers_give_the_same_images(name: str, asked: dict[str, object]) -> None:
    network = aerogel.load(FOLDERS / name)
    pipeline = network.processor
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0), **asked).images
    torch.testing.assert_close(torch.tensor(images), load_file(FOLDERS / f"{name}.safetensors")["images"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_older_facts_are_read(name: str) -> None:
    assert [one.step.name for one in policies.load(FOLDERS / name)] == POLICIES[name]
    assert record.read(FOLDERS / name) is not None
