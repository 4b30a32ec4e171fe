"""Trains zoo/fashion-unet, a Stable Diffusion pipeline of pixels: `python zoo/fashion_unet.py --images 200000` (52 minutes at 64 images/s).

The class enters as a prompt of one word through cross-attention, so the path of the time step sees nothing but the step.
"""

from __future__ import annotations

from pathlib import Path

import fashion
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusion import arguments, sampler, train, unchanging_autoencoder
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

OUTPUT = Path(__file__).parent / "fashion-unet"
TOKENS = 8
"""Tokens of a prompt, its beginning, its end and the filling included."""
UNCONDITIONAL = 0.1
"""Share of the images that are shown without their prompt, for guidance."""


def tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every class is one token."""
    merges: dict[tuple[str, str], None] = {}
    letters = sorted(set("".join(fashion.CLASSES)))
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in fashion.CLASSES:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        built = parts[0]
        for part in parts[1:]:
            merges[built, part] = None
            built += part
            if built not in pieces:
                pieces.append(built)
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TOKENS)


def build() -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """The networks before training."""
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=64,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=1, out_channels=1, block_out_channels=(32, 64, 120), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64, attention_head_dim=4,
    )  # fmt: skip
    return unet, text, words


def main() -> None:
    """Train and save."""
    how, data = arguments(__doc__)
    torch.manual_seed(how.seed)
    unet, text, words = build()
    prompts = words([*fashion.CLASSES, ""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    unet.to(memory_format=torch.channels_last)

    def predict(noisy: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.rand(len(labels)) < UNCONDITIONAL
        shown = labels.masked_fill(hidden, len(fashion.CLASSES))
        states = text(prompts).last_hidden_state[shown]
        return unet(noisy.contiguous(memory_format=torch.channels_last), steps, states).sample

    train(nn.ModuleList([unet, text]), predict, *fashion.load("train", data), how)
    pipeline = StableDiffusionPipeline(
        vae=unchanging_autoencoder(), text_encoder=text, tokenizer=words, unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=sampler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(OUTPUT)


if __name__ == "__main__":
    main()
