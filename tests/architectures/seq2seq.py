"""Every encoder-decoder language model of transformers' auto mapping, tiny."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from aerogel.model.calls import Call
from tests.architectures import weights
from tests.architectures.configs import TEXT_IDS, small_config

SPEECH = frozenset({
    "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize", "musicflamingo", "nemo_speechlm",
    "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral", "voxtral_realtime",
})  # fmt: skip
"""Types of the mapping that are language models behind an audio encoder: audio_text.py builds nine of the twelve."""
TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() - SPEECH))
SHAPES = (((2, 24), (2, 12)), ((1, 16), (1, 8)))
"""Sequences and tokens that the encoder and the decoder read."""


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build the model of a type, the same for the same seed; raises what transformers raises for a type that it cannot build here."""
    config = small_config(CONFIG_MAPPING[model_type], {"is_decoder": False})
    return weights.build(lambda: AutoModelForSeq2SeqLM.from_config(config), seed)


def calls(module: nn.Module) -> list[Call]:
    """Return two forwards of different shape."""
    generator = torch.Generator().manual_seed(0)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    found = []
    for source, target in SHAPES:
        ids, decoded = (torch.randint(*TEXT_IDS, shape, generator=generator) for shape in (source, target))
        found.append(Call((), {"input_ids": ids, "decoder_input_ids": decoded, **cache}))
    return found
