"""Inputs with pixels for the image-text models, found from what a model's forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.configs import IMAGE, TEXT_IDS, VISION_START

Arguments = dict[str, Any]


def pixels(module: nn.Module, images: int, generator: torch.Generator) -> Arguments:
    """Return random images in the layout that the model's vision tower reads."""
    vision = vision_config(module)
    takes = inspect.signature(getattr(module, "get_image_features", module.forward)).parameters
    takes = {*takes, *inspect.signature(module.forward).parameters}
    size, patch, channels = side(vision, "image_size", 32), side(vision, "patch_size", 8), channel_count(vision)
    if "image_grid_thw" in takes:
        frames = side(vision, "temporal_patch_size", 1)
        rows = torch.randn(images * 32, channels * frames * patch * patch, generator=generator)
        return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 4, 8]] * images)}
    found: Arguments = {"pixel_values": torch.randn(images, channels, size, size, generator=generator)}
    if "image_sizes" in takes:
        found["image_sizes"] = torch.tensor([[size, size]] * images)
    return found


def vision_config(module: nn.Module) -> Any:
    config = module.config
    for name in ("vision_config", "vq_config", "encoder", "vision_tower_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def side(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None) or default
    return value[0] if isinstance(value, list | tuple) else value


def channel_count(config: Any) -> int:
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3


def features(module: nn.Module, arguments: Arguments) -> int:
    """Return how many rows of the text's width the images become."""
    with torch.no_grad():
        answer = module.get_image_features(**arguments)
    return rows_in(getattr(answer, "pooler_output", answer))


def rows_in(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.numel() // tree.shape[-1]
    return sum(rows_in(each) for each in tree)


def with_images(module: nn.Module, batch: int, length: int, generator: torch.Generator) -> Arguments:
    """Return a forward's arguments: text around one image in every row."""
    found = pixels(module, batch, generator)
    count = features(module, found) // batch
    text = torch.randint(*TEXT_IDS, (batch, length), generator=generator)
    image = torch.full((batch, count + 1), image_token(module))
    image[:, 0] = VISION_START
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    found["input_ids"] = ids
    takes = inspect.signature(module.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            found[name] = (ids == image_token(module)).int()
    return found


def image_token(module: nn.Module) -> int:
    config = module.config
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return IMAGE
