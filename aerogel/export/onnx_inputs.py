"""Inputs of the denoisers of diffusers by name, read off a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

BATCH, TOKENS = "batch", "tokens"
"""The axes that may have any length; all others are fixed."""
KNOWN = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
STEP, TIME, LABELS = "step", "timestep", "class_labels"
_UNKNOWN = (
    ("class_embed_type", (None,), "embeds its class in a way of its own"),
    ("addition_embed_type", (None, "text_time"), "adds more to the time step than pooled text and sizes"),
    ("time_cond_proj_dim", (None,), "takes a guidance scale"),
    ("encoder_hid_dim_type", (None, "text_proj"), "attends to images"),
    ("time_embedding_type", (None, "positional"), "embeds its time step otherwise than by a sinusoid"),
)


Shape = tuple[int | str, ...]
"""Lengths, or names of axes that may have any length."""


def dtype_of(name: str) -> torch.dtype:
    """The dtype of an input."""
    return torch.int64 if name in (LABELS, STEP) else torch.float32


def example(name: str, shape: Shape) -> torch.Tensor:
    """Zeros to trace with."""
    lengths = {BATCH: 2, TOKENS: 8}
    return torch.zeros([length if isinstance(length, int) else lengths[length] for length in shape], dtype=dtype_of(name))


def nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a forward: names with a dot go into the dictionary that the dot leads into."""
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        place, _, key = name.rpartition(".")
        (arguments.setdefault(place, {}) if place else arguments)[key] = value
    return arguments


def unknown_inputs(config: Mapping[str, Any]) -> list[str]:
    """Return why a model takes inputs that are not known here."""
    return [f"it {what} ({key}={config.get(key)!r})" for key, known, what in _UNKNOWN if config.get(key) not in known]


def inputs_of(config: Mapping[str, Any], size: int | None) -> dict[str, Shape]:
    """The inputs of a denoiser apart from the time step; `size` is the sample's height and width, by default the config's.

    A dot in a name leads into a dictionary that the network takes.
    """
    size = size or config["sample_size"]
    sample = (BATCH, config["in_channels"], size, size)
    match config["_class_name"]:
        case "UNet2DModel":
            return {"sample": sample, **_label(config, "num_class_embeds")}
        case "UNet2DConditionModel":
            text = (BATCH, TOKENS, config.get("encoder_hid_dim") or config["cross_attention_dim"])
            return {"sample": sample, **_label(config, "num_class_embeds"), "encoder_hidden_states": text, **_pooled(config)}
        case "DiTTransformer2DModel":
            return {"hidden_states": sample, **_label(config, "num_embeds_ada_norm")}
        case _:
            caption = (BATCH, TOKENS, config["caption_channels"])
            mask = (BATCH, TOKENS)
            return {"hidden_states": sample, "encoder_hidden_states": caption, "encoder_attention_mask": mask, **_sizes(config)}


def _label(config: Mapping[str, Any], setting: str) -> dict[str, Shape]:
    return {LABELS: (BATCH,)} if config.get(setting) else {}


def _pooled(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what SDXL adds to its time step: six sizes and the pooled text fill the width of its embedding."""
    if config.get("addition_embed_type") is None:
        return {}
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"added_cond_kwargs.text_embeds": (BATCH, width), "added_cond_kwargs.time_ids": (BATCH, 6)}


def _sizes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what PixArt adds for images of 1024 pixels."""
    given = config.get("use_additional_conditions")
    if not (config["sample_size"] == 128 if given is None else given):
        return {}
    return {"added_cond_kwargs.resolution": (BATCH, 2), "added_cond_kwargs.aspect_ratio": (BATCH, 1)}
