"""A tokenizer and an image processor together, where transformers cannot build its combined processor.

Some combined processors want a video processor, which wants torchvision. Text and images need neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError


class Pair:
    """Does for one prompt with images what the combined processor of its family does.

    For families whose images become as many tokens as their grid of patches has merged patches (`image_grid_thw`), all alike.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, image_token: str) -> None:
        self.tokenizer, self.image_processor, self.image_token = tokenizer, image_processor, image_token

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's."""
        template: str | None = self.tokenizer.chat_template
        return template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text: str, images: list[Any] | None = None, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask, mm_token_type_ids and, with images, pixel_values and image_grid_thw.

        Raises AerogelError when the prompt has another number of images than there are, or images come without a grid.
        """
        shown = dict(self.image_processor(images=images, return_tensors="pt")) if images else {}
        if images and "image_grid_thw" not in shown:
            raise AerogelError(f"{type(self.image_processor).__name__} gives no grid of patches; its combined processor is needed")
        grids = shown.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        pieces = text.split(self.image_token)
        if len(pieces) != len(grids) + 1:
            raise AerogelError(f"the prompt has {len(pieces) - 1} places for images ({self.image_token}), and {len(grids)} are given")
        merged = self.image_processor.merge_size**2
        filled = [piece + self.image_token * (int(grid.prod()) // merged) for piece, grid in zip(pieces, grids, strict=False)]
        ids = torch.tensor([self.tokenizer("".join([*filled, pieces[-1]]), add_special_tokens=False)["input_ids"]])
        pictured = ids == self.tokenizer.convert_tokens_to_ids(self.image_token)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": pictured.int(), **shown}

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
