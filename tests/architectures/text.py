"""Every causal language model of transformers' auto mapping, tiny."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aerogel.model.calls import Call
from tests.architectures import weights
from tests.architectures.configs import TEXT_IDS, small_config

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
SHAPES = ((2, 24), (1, 16))
"""Sequences and tokens of the calls; 16 is a multiple of every chunk length."""

DECODERS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
"""Types whose causal language model takes the configuration of the decoder alone."""


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build the model of a type, the same for the same seed.

    Raises what transformers raises for a type that it cannot build here, such as one that needs a package that is not installed.
    """
    config = small_config(CONFIG_MAPPING[DECODERS.get(model_type, model_type)])
    if model_type in DECODERS:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return weights.build(lambda: model_class(config), seed)
    return weights.build(lambda: AutoModelForCausalLM.from_config(config), seed)


def calls(module: nn.Module) -> list[Call]:
    """Return two forwards of different shape."""
    generator = torch.Generator().manual_seed(0)
    inputs = INPUTS.get(type(module).__name__, _text)
    cache = {"use_cache": False} if _takes_cache(module) else {}
    return [Call((), inputs(torch.randint(*TEXT_IDS, shape, generator=generator)) | cache) for shape in SHAPES]


def _takes_cache(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "use_cache" in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def _text(ids: Tensor) -> dict[str, object]:
    return {"input_ids": ids}


def _codebooks(ids: Tensor) -> dict[str, object]:
    """Return one row for each of the four codebooks of a sequence."""
    return {"input_ids": torch.cat([ids, ids + 1, ids + 2, ids + 3])}


INPUTS: dict[str, Callable[[Tensor], dict[str, object]]] = {
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
}
"""Classes whose forward takes other inputs than the ids of text."""
