"""Random images in the layout that each image-text model reads, and forwards of the whole model with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.configs import IMAGE, TEXT_IDS, VISION_START

Arguments = dict[str, Any]
GRID = (4, 8)
"""Rows and columns of patches where images are given as rows of patches."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images of a model, and the generator that fills them."""

    images: int
    side: int
    patch: int
    channels: int
    frames: int
    generator: torch.Generator

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def sizes(module: nn.Module, images: int, generator: torch.Generator) -> Sizes:
    config: Any = module.config
    vision = next((v for name in ("vision_config", "vq_config", "encoder") if (v := getattr(config, name, None)) is not None), config)

    def first(default: int, *names: str) -> int:
        value = next((v for name in names if (v := getattr(vision, name, None))), default)
        return value[0] if isinstance(value, list | tuple) else value

    frames = first(1, "temporal_patch_size", "patch_temporal")
    return Sizes(images, first(32, "image_size"), first(8, "patch_size"), first(3, "num_channels", "in_channels"), frames, generator)


def squares(s: Sizes) -> Arguments:
    return {"pixel_values": s.random(s.images, s.channels, s.side, s.side)}


def sized_squares(s: Sizes) -> Arguments:
    return squares(s) | {"image_sizes": torch.tensor([[s.side, s.side]] * s.images)}


def tiles(s: Sizes) -> Arguments:
    """Return one tile an image, with a place for more."""
    return {"pixel_values": s.random(s.images, 1, s.channels, s.side, s.side)}


def marked_tiles(s: Sizes) -> Arguments:
    return tiles(s) | {"pixel_attention_mask": torch.ones(s.images, 1, dtype=torch.bool)}


def any_resolution(s: Sizes) -> Arguments:
    """Return the whole image and two tiles of it, for a grid of one row of two tiles."""
    pixels = s.random(s.images, 3, s.channels, s.side, s.side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[s.side, 2 * s.side]] * s.images)}


def patch_rows(s: Sizes) -> Arguments:
    rows = s.random(s.images * GRID[0] * GRID[1], s.channels * s.frames * s.patch**2)
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, *GRID]] * s.images)}


def single_frame_rows(s: Sizes) -> Arguments:
    rows = s.random(s.images * GRID[0] * GRID[1], s.channels * s.patch**2)
    return {"pixel_values": rows, "image_grid_hw": torch.tensor([GRID] * s.images)}


def patch_images(s: Sizes) -> Arguments:
    pixels = s.random(s.images * GRID[0] * GRID[1], s.channels, s.patch, s.patch)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *GRID]] * s.images)}


def merged_patches(s: Sizes) -> Arguments:
    """Return squares of 2 x 2 patches, one for each token, with the channels last."""
    pixels = s.random(s.images * 8, 2 * s.patch, 2 * s.patch, s.channels)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 4]] * s.images)}


def merge_sizes(s: Sizes) -> Arguments:
    return patch_rows(s) | {"image_merge_sizes": torch.tensor([2] * s.images)}


def shaped_patches(s: Sizes) -> Arguments:
    pixels = s.random(s.images, 16, s.channels * s.patch**2)
    mask = torch.ones(s.images, 16, dtype=torch.long)
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[4, 4]] * s.images), "pixel_attention_mask": mask}


def placed_patches(s: Sizes) -> Arguments:
    """Return patches with the place of each."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), dim=-1).reshape(1, 36, 2)
    return {"pixel_values": s.random(s.images, 36, s.channels * s.patch**2), "image_position_ids": places.expand(s.images, -1, -1)}


def placed_merged_patches(s: Sizes) -> Arguments:
    """Return squares of 3 x 3 patches with the place of each."""
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(s.images, 4, 2)
    return {"pixel_values": s.random(s.images, 4, s.channels * (3 * s.patch) ** 2), "image_position_ids": places}


def strip_of_patches(s: Sizes) -> Arguments:
    """Return the patches of all images side by side, as one image of one row."""
    pixels = s.random(1, s.channels, s.patch, s.images * GRID[0] * GRID[1] * s.patch)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([GRID] * s.images)}


def pooled_patches(s: Sizes) -> Arguments:
    """Return one crop an image of 4 x 4 patches, of which each token reads 2 x 2."""
    places = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    pooling = torch.cat([places + 16 * image for image in range(s.images)])
    grids = torch.tensor([[2, 2, 0, 0]] * s.images)
    return {"pixel_values": s.random(s.images, 16, s.channels * s.patch**2), "image_token_pooling": pooling, "image_grids": grids}


def two_resolutions(s: Sizes) -> Arguments:
    return squares(s) | {"high_res_pixel_values": s.random(s.images, s.channels, s.side, s.side)}


LAYOUTS: dict[str, Callable[[Sizes], Arguments]] = {
    "deepseek_vl_hybrid": two_resolutions,
    "diffusion_gemma": placed_patches,
    "emu3": sized_squares,
    "fuyu": lambda s: {"pixel_values": s.random(s.images, 8, s.channels * s.patch**2)},
    "gemma4": placed_patches,
    "gemma4_unified": placed_merged_patches,
    "granite4_vision": any_resolution,
    "granite_docling": marked_tiles,
    "idefics2": tiles,
    "idefics3": tiles,
    "inkling2": merged_patches,
    "kimi_k25": patch_images,
    "lfm2_vl": shaped_patches,
    "lighton_ocr": sized_squares,
    "llava_next": any_resolution,
    "llava_next_video": any_resolution,
    "llava_onevision": any_resolution,
    "minicpm_ocr": strip_of_patches,
    "minicpmv4_6": strip_of_patches,
    "minicpmv4_7": strip_of_patches,
    "mistral3": sized_squares,
    "mistral_large4": sized_squares,
    "molmo2": pooled_patches,
    "nemotron_h_omni": single_frame_rows,
    "paddleocr_vl": patch_images,
    "perception_lm": tiles,
    "smolvlm": tiles,
    "video_llama_3": merge_sizes,
}
"""Layouts other than whole images, or rows of patches where the forward takes `image_grid_thw`."""


def placeholder_arguments(module: nn.Module, model_type: str, batch: int, length: int, generator: torch.Generator) -> Arguments:
    """Return a forward's arguments: text around one image in every row, whose tokens the vision tower's features replace."""
    takes = inspect.signature(module.forward).parameters
    layout = LAYOUTS.get(model_type, patch_rows if "image_grid_thw" in takes else squares)
    arguments = layout(sizes(module, batch, generator))
    image_token = _image_token(module)
    count = _feature_rows(module, arguments) // batch
    text = torch.randint(*TEXT_IDS, (batch, length), generator=generator)
    image = torch.full((batch, count + 1), image_token)
    image[:, 0] = VISION_START
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    types = {name: (ids == image_token).int() for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    return {"input_ids": ids, **arguments, **types}


def _image_token(module: nn.Module) -> int:
    config: Any = module.config
    return next((v for name in ("image_token_id", "image_token_index") if (v := getattr(config, name, None)) is not None), IMAGE)


def _feature_rows(module: Any, arguments: Arguments) -> int:
    """Return how many tokens the images of a call become."""
    owner = next(each for each in module.modules() if hasattr(each, "get_image_features"))
    with torch.no_grad():
        features = owner.get_image_features(**arguments, return_dict=True)
    if getattr(features, "deepstack_features", None) and features.pooler_output is None:
        return _rows(features.deepstack_features[0][1])
    return _rows(features.last_hidden_state if getattr(features, "pooler_output", None) is None else features.pooler_output)


def _rows(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.numel() // tree.shape[-1]
    return sum(_rows(each) for each in tree)
