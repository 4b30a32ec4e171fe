"""Every architecture of transformers' auto mappings and of diffusers is built tiny and runs."""

from __future__ import annotations

import pytest
import torch

from aerogel.model.calls import tensors_in
from tests.architectures.cases import Case, cases, outcomes, output

CASES = {str(case): case for case in cases()}
SAMPLE = {
    "causal-llama": "dense",
    "causal-gemma2": "norms before and after each sublayer",
    "causal-gpt_neox": "attention and FFN side by side, q, k, v in one matrix by head",
    "causal-phi3": "q, k, v in one matrix, gate and up in one matrix",
    "causal-gpt2": "Conv1D",
    "causal-qwen3_moe": "experts in 3-D tensors",
    "causal-gpt_oss": "experts with biases, gate and up interleaved",
    "causal-llama4_text": "every expert multiplies every token",
    "causal-deepseek_v3": "latent attention, shared experts",
    "causal-mamba": "state-space",
    "causal-mamba2": "state-space with heads",
    "causal-qwen3_next": "gated DeltaNet beside attention",
    "causal-falcon_h1": "state-space and attention in one layer",
    "causal-lfm2": "convolutions beside attention",
    "causal-jamba": "state-space beside attention, with experts",
    "causal-rwkv": "recurrent",
    "causal-bert": "encoder as a causal model",
    "image-text-qwen2_5_vl": "images as rows of patches",
    "image-text-llava": "images as squares",
    "image-text-mllama": "cross-attention to the image",
    "image-text-florence2": "encoder-decoder",
    "denoiser-FluxTransformer2DModel": "image and text in one attention",
    "denoiser-WanTransformer3DModel": "video",
    "denoiser-UNet2DConditionModel": "UNet",
}
"""The 24 cases of the default run, which differ in kind; all others are slow."""
NOT_BUILT = {
    "causal-gemma3n": "timm",
    "causal-gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "causal-gemma4_unified_assistant": "layer types producing a cache",
    "image-text-gemma3n": "timm",
    "image-text-inkling_mm_model": "scipy",
}
"""Types that transformers 5.23 cannot build here, with words of its reason.

A type of Gemma 4's assistants shares the keys and values of all of its layers, which its text configuration refuses.
"""
TARGETS = {"causal": 175, "seq2seq": 25, "image-text": 75, "denoiser": 32}


def every(names: set[str]) -> list[object]:
    return [pytest.param(CASES[name], id=name, marks=() if name in SAMPLE else pytest.mark.slow) for name in sorted(names)]


@pytest.mark.filterwarnings("ignore")  # the libraries' own warnings about small configurations
@pytest.mark.parametrize("case", every(CASES.keys() - NOT_BUILT.keys()))
def test_runs_the_same_for_the_same_seed(case: Case) -> None:
    first, second = case.make(), case.make()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    calls = case.calls(first)
    assert len({tuple(tensor.shape for tensor in tensors_in((call.args, call.kwargs))) for call in calls}) == 2
    for call in calls:
        answer = output(first, call)
        assert answer.isfinite().all()
        assert answer.unique().numel() >= 32
        assert torch.equal(output(second, call), answer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_every_parameter_is_random_float32_and_without_gradient(name: str) -> None:
    module = CASES[name].make()
    assert not module.training
    assert sum(parameter.numel() for parameter in module.parameters()) < 60e6
    for key, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32, key
        assert not parameter.requires_grad, key
        assert parameter.numel() == 1 or parameter.std() > 0, key


def test_the_sample_is_of_24_cases() -> None:
    assert len(SAMPLE) == 24
    assert SAMPLE.keys() <= CASES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_as_many_types_run_as_are_promised() -> None:
    found = outcomes(CASES.values())
    ran = [outcome for outcome in found if not outcome.reason]
    for kind, target in TARGETS.items():
        assert sum(outcome.kind == kind for outcome in ran) >= target
    failed = {f"{outcome.kind}-{outcome.name}": outcome.reason for outcome in found if outcome.reason}
    assert failed.keys() == NOT_BUILT.keys()
    assert all(words in failed[name] for name, words in NOT_BUILT.items())
