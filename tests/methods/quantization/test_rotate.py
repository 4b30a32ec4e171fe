"""Rotation preserves the function of every family that has a residual stream, and refuses the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from aerogel.errors import AerogelError
from aerogel.methods.quantization.rotate import Rotate, keep_mean, stream_of
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.numerics.rotation import randomized_hadamard
from tests.tiny import FAMILIES, opened, output

EXACT = (
    "llama", "mistral", "qwen2", "smollm3", "qwen3", "opt", "phi3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llava", "qwen2_5_vl",
)  # fmt: skip
GATED = r"\S+: what \S+ writes passes a norm or a gate before it is added"
REFUSED = dict.fromkeys(("gemma2", "gemma3", "dit", "wan"), GATED)


def difference(name: str, network: Network, rotate: Rotate) -> float:
    """Largest change of a logit over the largest logit."""
    calls = FAMILIES[name].calls(2)
    before = [output(network.module, call) for call in calls]
    rotate.apply(network, [])
    return max(float((output(network.module, c) - b).abs().max() / b.abs().max()) for c, b in zip(calls, before, strict=True))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", EXACT)
def test_logits_are_the_same(name: str, kind: str) -> None:
    network = opened(name)
    weights = {key: value.clone() for key, value in network.module.state_dict().items()}
    assert difference(name, network, Rotate(kind=kind, seed=3)) < 1e-4  # type: ignore[arg-type]
    changed = {key for key, value in network.module.state_dict().items() if not torch.allclose(value, weights[key], atol=1e-3)}
    stream = stream_of(network)
    assert {*stream.tables, *(f"{name}.weight" for name in (*stream.writers, *stream.readers))} <= changed


@pytest.mark.parametrize("name", EXACT)
def test_a_model_of_one_token_keeps_its_mean(name: str) -> None:
    """Embeddings far from zero mean: to take the mean away, right under LayerNorm, would ruin an RMSNorm model."""
    network = opened(name)
    for table in stream_of(network).tables:
        network.module.get_parameter(table).data += 2.0
    assert difference(name, network, Rotate()) < 1e-4


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_models_without_an_exact_rotation_are_refused_with_the_reason(name: str, why: str) -> None:
    network = opened(name)
    weights = {key: value.clone() for key, value in network.module.state_dict().items()}
    with pytest.raises(AerogelError, match=rf"this \w+ model has no residual stream that a rotation passes \({why}.*leave this step out"):
        Rotate().apply(network, [])
    assert all(torch.equal(value, weights[key]) for key, value in network.module.state_dict().items())


def test_norms_after_the_sum_are_refused() -> None:
    """OPT-350m normalises the stream itself."""
    shape = {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 32,
    }
    module = transformers.OPTForCausalLM(transformers.OPTConfig(**shape, do_layer_norm_before=False))
    with pytest.raises(AerogelError, match="cannot rotate"):
        Rotate().apply(Network(module, Family("opt", ("opt",))), [])


def test_what_is_quantized_or_absent_is_refused_before_any_change() -> None:
    network = opened("llama")
    embedding = network.module.get_submodule("model.embed_tokens").weight.clone()
    network.module.get_submodule("model.layers.1").to("meta")
    with pytest.raises(AerogelError, match="not in memory"):
        Rotate().apply(network, [])
    assert torch.equal(network.module.get_submodule("model.embed_tokens").weight, embedding)


def test_a_dead_norm_channel_with_a_bias_is_refused() -> None:
    network = opened("opt")
    norm = network.module.get_submodule("model.decoder.final_layer_norm")
    assert isinstance(norm, nn.LayerNorm)
    norm.weight[3] = 0
    with pytest.raises(AerogelError, match="weight 0"):
        Rotate().apply(network, [])


def test_outliers_are_spread() -> None:
    network = opened("llama")
    module = network.module
    for name, linear in module.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            linear.weight.data[5] *= 50  # a massive channel of the stream
    seen: list[torch.Tensor] = []

    def kurtosis() -> float:
        seen.clear()
        hook = module.get_submodule("model.layers.1.input_layernorm").register_forward_hook(lambda _, __, out: seen.append(out))
        output(module, FAMILIES["llama"].calls(1)[0])
        hook.remove()
        x = seen[0].flatten()
        return float((x**4).mean() / (x**2).mean() ** 2)

    before = kurtosis()
    Rotate().apply(network, [])
    assert before > 20
    assert kurtosis() < 5


@pytest.mark.parametrize("name", ["qwen2", "opt"])
def test_tied_heads_are_untied_and_the_saved_folder_says_so(name: str, tmp_path: Path) -> None:
    network = opened(name)
    assert network.config.tie_word_embeddings
    Rotate().apply(network, [])
    assert not network.config.tie_word_embeddings
    network.module.save_pretrained(tmp_path)  # type: ignore[operator]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    call = FAMILIES[name].calls(1)[0]
    assert torch.equal(output(again, call), output(network.module, call))


def test_keep_mean_keeps_the_mean_and_stays_flat() -> None:
    rotation = keep_mean(randomized_hadamard(576, torch.Generator().manual_seed(0)))
    ones = torch.ones(576, dtype=torch.float64)
    assert torch.allclose(rotation @ ones, ones)
    assert torch.allclose(rotation @ rotation.T, torch.eye(576, dtype=torch.float64), atol=1e-12)
    assert float(rotation.abs().max()) < 0.25
    assert torch.equal(keep_mean(torch.eye(8, dtype=torch.float64)), torch.eye(8, dtype=torch.float64))
