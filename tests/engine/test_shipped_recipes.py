"""Every shipped recipe for language models does its whole job: plain transformers opens the folder, with the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.data import text
from aerogel.engine.calibration import Samples
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.model.kv_cache import with_cache
from aerogel.recipe import Recipe
from tests.folders import model_folder, text_file
from tests.releases import DENSE
from tests.tiny import output

# Largest relative error of the output on text of the same kind; random weights, which are the hardest to round.
CLOSE = {
    "rtn-w8a8": 0.05, "smoothquant-w8a8": 0.05, "fp8-dynamic": 0.15,
    "rtn-w4a16": 0.4, "awq-w4a16": 0.35, "gptq-w4a16": 0.15, "gptq-w3a16": 0.3,
}  # fmt: skip
ELSEWHERE = {"experts", "images", "decoder", "layers", "teacher", "time_path", "trajectories", "concatenations"}
"""Requirements of recipes for MoE and vision-language models, long prompts, deep models and denoisers, which have tests of their own."""


def for_language(recipe: str) -> bool:
    """Return True if no step requires more than a plain language model has."""
    return all(ELSEWHERE.isdisjoint(step.method.requires) for step in Recipe.parse(recipe).steps)


LANGUAGE = [recipe for recipe in catalog.names("recipes") if for_language(recipe)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    text_file(folder / "text.txt", 20000)
    return model_folder(folder / "model", hidden_size=128, intermediate_size=256)


def _opened_by_transformers(folder: Path) -> nn.Module:
    module: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module.eval()


@pytest.mark.parametrize("recipe", LANGUAGE)
def test_recipe(recipe: str, source: Path, tmp_path: Path) -> None:
    original = aerogel.load(source, lazy=False)
    words = source.parent / "text.txt"
    samples = Samples(words, count=32, length=64)
    calls = text.calls(text.samples(original.processor, words, 4, 64, seed=1), batch=2)
    result = aerogel.compress(source, recipe, output=tmp_path / "out", samples=samples, measures=())
    assert not [line for line in result.journal if line.get("fallback")]
    ours = aerogel.load(tmp_path / "out", lazy=False)
    linears = [part for part in ours.module.modules() if isinstance(part, QuantLinear)]
    quantizes = any(step.method.quantizes for step in Recipe.parse(recipe).steps)
    assert len(linears) == (2 * 7 if quantizes else 0)
    theirs = _opened_by_transformers(tmp_path / "out") if DENSE or recipe != "gptq-w3a16" else None
    if theirs is None:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            _opened_by_transformers(tmp_path / "out")
    # Transformers rounds keys and values in every forward of a folder with a quantized cache, this package where there is a cache.
    for call in map(with_cache, calls) if recipe.endswith("-kv8") else calls:
        before = output(original.module, call)
        with cache_dequantized(ours.module):
            answer = output(ours.module, call)
        assert (answer - before).norm() > 0
        if recipe in CLOSE:
            assert (answer - before).norm() < CLOSE[recipe] * before.norm()
        else:  # pruned random weights lose most of the output, but not its direction
            assert torch.cosine_similarity(answer.flatten(), before.flatten(), dim=0) > 0.3
        if theirs is not None:
            torch.testing.assert_close(output(theirs, call), answer, rtol=1e-4, atol=1e-5)
    if quantizes:
        assert (tmp_path / "out/model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size
