"""Folders that an earlier release wrote: they open, with their policies on, and answer as they did then.

tests/fixtures/before_layers was written by the commit before the layers runtime/, layers/ and io/ existed; the outputs beside the folders
are that commit's, in float32 with dequantized weights, so that no kernel's own rounding counts.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aerogel
from aerogel.engine import policies
from aerogel.io.record import files
from aerogel.kernels.affine import exact
from aerogel.layers.linear import cache_dequantized
from tests.tiny import FAMILIES, output

FOLDERS = Path(__file__).parent.parent / "fixtures/before_layers"
POLICIES = {
    "language": [],
    "experts": ["reduced_topk"],
    "denoiser": ["attention_quant", "uniform_cache"],
    "unet": ["temporal_cache"],
}


def require_same(found: torch.Tensor, saved: torch.Tensor) -> None:
    """Raise AssertionError for other numbers than those that a processor with exact products of 8-bit integers gave."""
    if exact():
        torch.testing.assert_close(found, saved, rtol=0, atol=1e-4 if saved.ndim == 4 else 1e-5)
    assert (found - saved).norm() < 0.02 * saved.norm()  # other kernels run elsewhere: some inputs may round to the next of 8 bits


@pytest.mark.parametrize(("name", "tiny"), [("language", "llama"), ("experts", "qwen3_moe")])
def test_older_language_models_give_the_same_logits(name: str, tiny: str) -> None:
    network = aerogel.load(FOLDERS / name, lazy=False, dtype=torch.float32)
    saved = load_file(FOLDERS / f"{name}.safetensors")
    (call,) = FAMILIES[tiny].calls(1)
    for key, value in call.kwargs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, saved[f"0.{key}"]), "the inputs of today's tests are those of then"
    with cache_dequantized(network.module):
        logits = output(network.module, call)
    require_same(logits, saved["0.output"])


@pytest.mark.parametrize(("name", "asked"), [("denoiser", {"class_labels": [0, 7]}), ("unet", {"batch_size": 2})])
def test_older_denoisers_give_the_same_images(name: str, asked: dict[str, object]) -> None:
    network = aerogel.load(FOLDERS / name)
    pipeline = network.processor
    pipeline.set_progress_bar_config(disable=True)
    with cache_dequantized(network.module):
        images = pipeline(num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0), **asked).images
    require_same(torch.tensor(images), load_file(FOLDERS / f"{name}.safetensors")["images"])


@pytest.mark.parametrize("name", POLICIES)
def test_older_facts_are_read(name: str) -> None:
    assert [one.step.name for one in policies.load(FOLDERS / name)] == POLICIES[name]
    assert files.read(FOLDERS / name).coverage is not None
    files.verify(FOLDERS / name)


@pytest.mark.parametrize("name", POLICIES)
def test_a_network_that_nobody_holds_is_freed(name: str) -> None:
    network = aerogel.load(FOLDERS / name)
    module = weakref.ref(network.module)
    assert copy.deepcopy(network.module) is not network.module
    del network
    gc.collect()
    assert module() is None
