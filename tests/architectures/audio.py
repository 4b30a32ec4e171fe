"""Random audio for models that have an audio tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.configs import AUDIO

Arguments = dict[str, Any]
FRAMES = 40
MEL_BINS = 16
TOKEN_TYPE = 3
"""What `mm_token_type_ids` says of an audio token in Gemma 4."""


def _masked_mel_first(batch: int, generator: torch.Generator) -> Arguments:
    features = torch.randn(batch, MEL_BINS, FRAMES, generator=generator)
    return {"input_features": features, "feature_attention_mask": torch.ones(batch, FRAMES, dtype=torch.long)}


def _masked_mel_last(batch: int, generator: torch.Generator) -> Arguments:
    features = torch.randn(batch, FRAMES, 128, generator=generator)
    return {"input_features": features, "input_features_mask": torch.ones(batch, FRAMES, dtype=torch.bool)}


def _chunks(batch: int, generator: torch.Generator) -> Arguments:
    features = torch.randn(batch, 128, FRAMES, generator=generator)
    return {"input_features": features, "chunk_sample_lengths": torch.full((batch,), 160 * FRAMES)}


def _samples(batch: int, generator: torch.Generator) -> Arguments:
    return {"input_values": torch.randn(batch, 3840, generator=generator)}


SOUNDS: dict[str, Callable[[int, torch.Generator], Arguments]] = {
    "dots3_note": _chunks,
    "gemma4": _masked_mel_last,
    "muse_spark": _samples,
    "qwen2_5_omni_thinker": _masked_mel_first,
    "qwen3_omni_moe_thinker": _masked_mel_first,
}
"""Image-text types that have an audio tower too, with audio as that tower reads it."""


def with_audio(module: nn.Module, model_type: str, arguments: Arguments, generator: torch.Generator) -> Arguments:
    """Add audio to the arguments of a forward of one of these types, and its tokens behind the text of every row."""
    return with_features(module, arguments, SOUNDS[model_type](arguments["input_ids"].shape[0], generator))


def with_features(module: nn.Module, arguments: Arguments, found: Arguments, tokens: int = 0) -> Arguments:
    """Add features of audio to the arguments of a forward, and their tokens behind the text of every row.

    `tokens` is the number for each row where the model has no function that tells.
    """
    ids = arguments["input_ids"]
    count = tokens or _tokens(module, found) // ids.shape[0]
    longer = {"input_ids": _append(ids, count, AUDIO)}
    if "mm_token_type_ids" in arguments:
        longer["mm_token_type_ids"] = _append(arguments["mm_token_type_ids"], count, TOKEN_TYPE)
    return arguments | longer | found


def _append(row: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([row, torch.full((row.shape[0], count), value, dtype=row.dtype)], dim=1)


def _tokens(module: Any, found: Arguments) -> int:
    """Return how many tokens the audio of a call becomes."""
    owner = next(each for each in module.modules() if hasattr(each, "get_audio_features"))
    with torch.no_grad():
        answer = owner.get_audio_features(**found, return_dict=True)
    features = answer.last_hidden_state if getattr(answer, "pooler_output", None) is None else answer.pooler_output
    return features.numel() // features.shape[-1]
