"""Language models behind an audio encoder, of transformers' auto mapping of sequence-to-sequence models, tiny."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from aerogel.model.calls import Call
from tests.architectures import weights
from tests.architectures.audio import Arguments, with_features
from tests.architectures.configs import TEXT_IDS, small_config

FRAMES = 64
"""Frames of audio; the encoder's table of positions has half as many."""


def _mel(batch: int, generator: torch.Generator) -> Arguments:
    return {"input_features": torch.randn(batch, 16, FRAMES, generator=generator)}


def _masked(batch: int, generator: torch.Generator, frames: int = FRAMES) -> Arguments:
    features = torch.randn(batch, 16, frames, generator=generator)
    return {"input_features": features, "input_features_mask": torch.ones(batch, frames, dtype=torch.long)}


def _feature_masked(batch: int, generator: torch.Generator) -> Arguments:
    return _mel(batch, generator) | {"feature_attention_mask": torch.ones(batch, FRAMES, dtype=torch.long)}


def _stacked(batch: int, generator: torch.Generator) -> Arguments:
    return {"input_features": torch.randn(batch, FRAMES, 160, generator=generator)}


SOUNDS: dict[str, Callable[[int, torch.Generator], Arguments]] = {
    "audioflamingo3": _masked,
    "glmasr": _masked,
    "granite_speech": _stacked,
    "granite_speech_plus": _stacked,
    "moss_transcribe_diarize": _masked,
    "musicflamingo": _masked,
    "qwen2_audio": _feature_masked,
    "qwen3_asr": partial(_masked, frames=100),  # a whole window of its encoder
    "voxtral": _mel,
}
"""Types with audio as their encoder reads it."""
TOKENS = {"moss_transcribe_diarize": 8, "musicflamingo": 16, "qwen2_audio": 16}
"""Tokens of the audio where `get_audio_features` is missing or needs the tokens themselves."""
TYPES: tuple[str, ...] = tuple(sorted(SOUNDS))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build the model of a type, the same for the same seed; raises what transformers raises for a type that it cannot build here."""
    config = small_config(CONFIG_MAPPING[model_type])
    return weights.build(lambda: AutoModelForSeq2SeqLM.from_config(config), seed)


def calls(module: nn.Module, model_type: str) -> list[Call]:
    """Return two forwards of different shape, with audio behind the text of every row."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((2, 24), (1, 12)):
        arguments = {"input_ids": torch.randint(*TEXT_IDS, shape, generator=generator), "use_cache": False}
        found.append(Call((), with_features(module, arguments, SOUNDS[model_type](shape[0], generator), TOKENS.get(model_type, 0))))
    return found
