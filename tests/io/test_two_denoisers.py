"""A pipeline with two denoisers, as Wan 2.2 has them: both are calibrated on the steps that are theirs, saved and opened again."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import tokenizers
import torch
import transformers

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.io.load import part_of
from aerogel.layers.linear import QuantLinear, cache_dequantized
from tests.tiny import FAMILIES, output

GIVEN = Denoising(count=2, steps=4, prompts=("a boot", "a bag"), batch=1, height=32, width=32, num_frames=5)
RECIPE = {"name": "four-bits", "steps": [{"gptq": {"scheme": "W4A16_G32"}}]}


def pipeline() -> diffusers.WanPipeline:
    """Return a tiny one, with random weights."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "a", "boot", "bag"))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = transformers.UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    sampler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    first, second = (FAMILIES["wan"].build() for _ in range(2))
    for weight in second.parameters():
        weight.data *= 1.1
    encoder = transformers.UMT5EncoderModel(config).eval()
    return diffusers.WanPipeline(tokenizer, encoder, vae, sampler, first, second, boundary_ratio=0.9)


def latents(made: diffusers.WanPipeline) -> torch.Tensor:
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    found: torch.Tensor = made(
        prompt="a boot", height=32, width=32, num_frames=5, num_inference_steps=4, output_type="latent", generator=generator
    ).frames
    return found


def test_both_are_compressed_saved_and_opened(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "in")
    network = aerogel.load(tmp_path / "in")
    assert [tower.name for tower in network.towers] == ["transformer.blocks", "transformer_2.blocks"]
    plan = aerogel.plan(network, RECIPE, samples=GIVEN)
    assert len(plan.touched) == 2 * 26
    result = aerogel.compress(tmp_path / "in", RECIPE, samples=GIVEN, output=tmp_path / "out", measures=())
    made_on = {line["name"].partition(".")[0] for line in result.journal if "fallback" not in line}
    assert made_on == {"transformer", "transformer_2"}
    for part in ("transformer", "transformer_2"):
        assert "quantization_config" in json.loads((tmp_path / "out" / part / "config.json").read_text())
    opened = aerogel.load(tmp_path / "out")
    aerogel.register_diffusers()
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert all(any(isinstance(part, QuantLinear) for part in each.modules()) for each in (theirs.transformer, theirs.transformer_2))
    with cache_dequantized(opened.module), cache_dequantized(theirs.transformer), cache_dequantized(theirs.transformer_2):
        assert torch.equal(latents(opened.processor), latents(theirs))


def test_a_pipeline_in_memory_is_saved_with_both(tmp_path: Path) -> None:
    made = pipeline()
    aerogel.compress(made, {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, output=tmp_path / "out", measures=())
    opened = aerogel.load(tmp_path / "out")
    for name in ("transformer", "transformer_2"):
        call = FAMILIES["wan"].calls(1)[0]
        with cache_dequantized(made.components[name]), cache_dequantized(opened.module):
            assert torch.equal(output(opened.processor.components[name], call), output(made.components[name], call))


def test_what_needs_one_denoiser_says_so(tmp_path: Path) -> None:
    made = pipeline()
    with pytest.raises(AerogelError, match=r"teacache: the wan family names no streams"):
        aerogel.compress(made, {"steps": [{"teacache": {}}]}, samples=GIVEN, measures=())
    made.save_pretrained(tmp_path)
    with pytest.raises(AerogelError, match=r"2 denoisers \(transformer, transformer_2\), expected one"):
        part_of(tmp_path)
