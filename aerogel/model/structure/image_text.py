"""Example calls of vision-language models: an image, and a text with as many places for it as it has features."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call, tensors_in

_AROUND = 8
"""Tokens of text around the image."""
_TOKEN = ("image_token_id", "image_token_index")


def with_images(part: nn.Module, images: Iterable[Call]) -> Iterator[Call]:
    """Yield calls with text and one of the images that the model takes; it is told how many features each has by running its encoder.

    Nothing is yielded for a model without a token that stands for an image, or without transformers' `get_image_features`.
    """
    config: Any = getattr(part, "config", None)
    token = next((value for name in _TOKEN if isinstance(value := getattr(config, name, None), int)), None)
    encode: Any = getattr(part, "get_image_features", None) or getattr(getattr(part, "model", None), "get_image_features", None)
    if token is None or encode is None:
        return
    text = config.get_text_config()
    takes = set(inspect.signature(encode).parameters)
    for image in images:
        if image.args or (not takes.issuperset(image.kwargs) and "kwargs" not in takes):
            continue
        try:
            features = _features(encode(**image.kwargs), text.hidden_size)
        except Exception:  # noqa: BLE001, S112  whatever the code of a model raises on images that it does not take
            continue
        yield from _calls(image, features, token, text.vocab_size)


def _features(found: Any, width: int) -> int:
    """The number of vectors that an encoder gives; for models with several outputs those that the text reads."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            found = getattr(found, name)
            break
    return sum(tensor.numel() // width for tensor in tensors_in(found) if tensor.is_floating_point() and tensor.shape[-1] == width)


def _calls(image: Call, features: int, token: int, vocabulary: int) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    for rows in (2, 1):  # an image a row, or both in one
        if not features or features % rows:
            continue
        words = torch.randint(vocabulary // 4, vocabulary // 2, (rows, _AROUND), generator=generator)
        places = torch.full((rows, features // rows), token)
        ids = torch.cat([words[:, : _AROUND // 2], places, words[:, _AROUND // 2 :]], dim=1)
        for more in _beside(ids, (ids == token).long()):
            yield Call((), {"input_ids": ids, **image.kwargs, **more, "use_cache": False})


def _beside(ids: Tensor, is_image: Tensor) -> Iterator[dict[str, Tensor]]:
    """What models may ask for beside the tokens."""
    yield {}
    yield {"attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        yield {"attention_mask": torch.ones_like(ids), name: is_image}
