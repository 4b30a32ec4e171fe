"""Shipped recipes that drop image tokens: weights are rounded with all tokens, and the policy comes back with the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call
from aerogel.recipe import Recipe
from tests.tiny import IMAGE_TOKEN, output

RECIPES = [name for name in catalog.names("recipes") if any("images" in step.method.requires for step in Recipe.parse(name).steps)]
PATCHES = 16


def llava() -> nn.Module:
    """Widths that groups of 64 divide, and images of 4 x 4 patches."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=32
    )
    text = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).eval()


def calls(count: int) -> list[Call]:
    random = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        words = torch.randint(3, 100, (2, 12), generator=random)
        image = torch.full((2, PATCHES), IMAGE_TOKEN)
        ids = torch.cat([words[:, :4], image, words[:, 4:]], dim=1)
        pixels = torch.randn(2, 3, 32, 32, generator=random)
        made.append(Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}))
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    module, (held_out, *samples) = llava(), calls(4)
    before = output(module, held_out)
    result = aerogel.compress(module, recipe, samples=samples, output=tmp_path / "out", measures=())
    (one,) = result.policies
    assert 0 < one.state.kept < 1
    assert 0 < one.state.kl < 0.5
    ours = aerogel.load(tmp_path / "out", lazy=False)
    assert any(isinstance(part, QuantLinear) for part in ours.module.modules())
    with torch.no_grad():
        answer = ours.module(**held_out.kwargs).logits
    text_BN = held_out.kwargs["input_ids"] != IMAGE_TOKEN
    assert not answer[text_BN].isnan().any()
    assert answer.isnan().any(-1).sum() == 2 * (PATCHES - round(0.45 * PATCHES) - round(0.05 * PATCHES))
    assert torch.cosine_similarity(answer[text_BN].flatten(), before[text_BN].flatten(), dim=0) > 0.9
