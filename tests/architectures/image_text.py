"""Every image-text model of transformers' auto mapping, tiny."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from aerogel.model.calls import Call
from tests.architectures import weights
from tests.architectures.configs import TEXT_IDS, small_config
from tests.architectures.image_text_overrides import OVERRIDES

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))


def build(model_type: str, seed: int = 0) -> nn.Module:
    config = small_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type))
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    return weights.build(lambda: model_class._from_config(config), seed)


def calls(module: nn.Module) -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(module.forward).parameters
    found = []
    for shape in ((2, 24), (1, 16)):
        arguments: dict[str, Any] = {"input_ids": torch.randint(*TEXT_IDS, shape, generator=generator)}
        if "use_cache" in takes or "kwargs" in takes:
            arguments["use_cache"] = False
        found.append(Call((), arguments))
    return found
