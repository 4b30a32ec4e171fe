"""Every image-text model of transformers' auto mapping, tiny."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from aerogel.model.calls import Call
from tests.architectures import image_calls, weights
from tests.architectures.configs import small_config

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build the model of a type, the same for the same seed.

    Raises what transformers raises for a type that it cannot build here, such as one that needs a package that is not installed.
    """
    config = small_config(CONFIG_MAPPING[model_type])
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    return weights.build(lambda: model_class._from_config(config), seed)


def calls(module: nn.Module, model_type: str) -> list[Call]:
    """Return two forwards of the whole model of different shape, with an image in every row."""
    generator = torch.Generator().manual_seed(0)
    return [vision_call(module, model_type, batch, length, generator) for batch, length in ((2, 24), (1, 12))]


def vision_call(module: nn.Module, model_type: str, batch: int, length: int, generator: torch.Generator) -> Call:
    """Return a forward with pixels that reaches the vision tower and the language model.

    Two types have none: `mistral4` is a language model, and `evolla` reads the sequence of a protein.
    """
    arguments = image_calls.arguments(module, model_type, batch, length, generator)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    return Call((), arguments | cache)
