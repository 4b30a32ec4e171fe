"""All architectures that are built here, as one list: causal, encoder-decoder, image-text and audio-text models, and denoisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call, tensors_in

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


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it tiny, and forwards of it."""

    kind: str
    """One of causal, seq2seq, image-text, audio-text, denoiser."""
    name: str
    """Model type in transformers, or class in diffusers."""
    make: Callable[[], nn.Module]
    """Builds it; raises what the library raises for an architecture that it cannot build here."""
    calls: Callable[[nn.Module], list[Call]]
    """Returns two forwards of different shape for a model that `make` built."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class Outcome:
    """Tells if a case was built and ran."""

    kind: str
    name: str
    parameters: int
    """Number of parameters; 0 where it was not built."""
    reason: str
    """The error on one line, or nothing where it ran."""


def cases() -> list[Case]:
    """List all architectures; their classes are imported when they are made."""
    from tests.architectures import audio_text, denoisers, image_text, seq2seq, text

    found = [Case("causal", name, partial(text.build, name), text.calls) for name in text.TYPES]
    found += [Case("seq2seq", name, partial(seq2seq.build, name), seq2seq.calls) for name in seq2seq.TYPES]
    for kind, module in (("image-text", image_text), ("audio-text", audio_text)):
        found += [Case(kind, name, partial(module.build, name), partial(module.calls, model_type=name)) for name in module.TYPES]
    found += [Case("denoiser", name, partial(denoisers.build, name), partial(_ignoring_module, name)) for name in denoisers.TYPES]
    return found


def _ignoring_module(name: str, module: nn.Module) -> list[Call]:
    from tests.architectures import denoisers

    return denoisers.calls(name)


def outcomes(chosen: Iterable[Case]) -> list[Outcome]:
    """Build and run cases, and tell of each if it ran or why it did not."""
    return [_outcome(case) for case in chosen]


def _outcome(case: Case) -> Outcome:
    parameters = 0
    try:
        module = case.make()
        parameters = sum(parameter.numel() for parameter in module.parameters())
        for call in case.calls(module):
            output(module, call)
    except Exception as error:  # noqa: BLE001 - the libraries raise anything; the reason is what is asked for
        return Outcome(case.kind, case.name, parameters, reason(error))
    return Outcome(case.kind, case.name, parameters, "")


def reason(error: Exception) -> str:
    """Return the class and the text of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def output(module: nn.Module, call: Call) -> Tensor:
    """Return a model's answer to a call: its logits, its prediction or the first tensor of what it returns."""
    with torch.no_grad():
        answer: Any = module(*call.args, **call.kwargs)
    for name in ("logits", "sample"):
        if isinstance(getattr(answer, name, None), Tensor):
            return getattr(answer, name)
    return tensors_in(answer)[0]
