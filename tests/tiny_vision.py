"""Tiny vision-language models, and prompts with images for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.tiny_text import EXPERTS, SHAPE, WIDTH, text

IMAGE_TOKEN, VISION_START, VIDEO_TOKEN = 120, 121, 122


@dataclass(frozen=True)
class Tiles:
    """Images that are read as a whole and as tiles, 8 x 8 pixels a token; padding is cut off, and lines of tiles end with a separator."""

    side: int
    """Pixels along a tile."""
    tokens: tuple[int, int]
    """Tokens of the two images below: of the whole image, of its tiles, and separators."""

    @property
    def grids(self) -> list[list[int]]:
        """Sizes to which images are padded, in pixels."""
        return [[2 * self.side, 2 * self.side], [self.side, 2 * self.side]]

    @property
    def sizes(self) -> list[list[int]]:
        """Sizes of a narrow image and a wide one."""
        return [[2 * self.side, 5 * self.side // 4], [self.side, 2 * self.side]]


TILED = {"llava_next": Tiles(16, (4 + 4 * 2 + 4, 4 + 2 * 4 + 2)), "llava_onevision": Tiles(24, (9 + 6 * 4 + 6, 9 + 3 * 6 + 3))}


def image_text(number: int, generator: torch.Generator, *, images: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Text around one image in each row; every third call has text only."""
    inputs = text(number, generator)
    if number % 3 == 2:
        return inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = torch.full((2, tokens + 1), IMAGE_TOKEN)
    image[:, 0] = VISION_START
    inputs["input_ids"] = torch.cat([ids[:, :4], image, ids[:, 4:]], dim=1)
    inputs["attention_mask"] = torch.cat([mask, torch.ones_like(image)], dim=1)
    for name, value in images.items():
        inputs[name] = torch.randn(value, generator=generator) if isinstance(value, tuple) else value.clone()
    return inputs


def image_grid(number: int, generator: torch.Generator) -> dict[str, Any]:
    """Two images of 4 x 8 patches; 2 x 2 patches become one token."""
    images = {"pixel_values": (64, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 8]] * 2)}
    inputs = image_text(number, generator, images=images, tokens=8)
    if "pixel_values" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return inputs


def tiled(number: int, generator: torch.Generator, *, tiles: Tiles) -> dict[str, Any]:
    """A narrow and a wide image of tiles, one in each row, and padding before the shorter row; every third call has text only."""
    inputs = text(number, generator)
    if number % 3 == 2:
        return inputs
    rows = []
    for tokens, mask, words in zip(tiles.tokens, inputs["attention_mask"], inputs["input_ids"], strict=True):
        real = words[mask.bool()].tolist()
        rows.append([*real[:4], VISION_START, *[IMAGE_TOKEN] * tokens, *real[4:]])
    pixels = torch.randn(2, 5, 3, tiles.side, tiles.side, generator=generator)
    return inputs | padded(rows) | {"pixel_values": pixels, "image_sizes": torch.tensor(tiles.sizes)}


def padded(rows: list[list[int]]) -> dict[str, Any]:
    """Token ids of rows of unlike length, padded on the left, and their mask."""
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]), "attention_mask": mask}


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={**SHAPE, "rope_parameters": rope},
        vision_config={
            "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 4, "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SHAPE, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN, video_token_id=122, vision_start_token_id=VISION_START, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=32
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**SHAPE), image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)


def qwen3_vl_moe() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**SHAPE, **EXPERTS, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE_TOKEN, video_token_id=122, vision_start_token_id=VISION_START, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**SHAPE, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config)


def llava_next() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=32
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SHAPE),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=TILED["llava_next"].grids,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**SHAPE), image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN, image_grid_pinpoints=TILED["llava_onevision"].grids,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [16, 16],
        "patch_size": [4, 4],
    }  # fmt: skip
    language = transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16)
    config = transformers.InternVLConfig(vision_config=vision, text_config=language, image_token_id=IMAGE_TOKEN, downsample_ratio=0.5)
    return transformers.InternVLForConditionalGeneration(config)
