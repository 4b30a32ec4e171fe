"""Trains zoo/fashion-dit, a DiT pipeline of pixels: `python zoo/fashion_dit.py` (640,000 images in 41 minutes, one thread)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import fashion
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import arguments, sampler, train, unchanging_autoencoder
from torch import Tensor, nn

OUTPUT = Path(__file__).parent / "fashion-dit"
NO_CLASS = 1000
"""The label that DiTPipeline gives to the branch without one."""
UNLABELLED = 0.15
"""Share of images that are shown without their label."""
IMAGES, BATCH, FLOOR = 640_000, 16, 1.0
"""A trial of 60,000 images drew what was asked for in 16 % of its images without the floor, in 50 % with it."""


def build() -> DiTTransformer2DModel:
    """The network before training; 1000 classes because the pipeline's own label for "no class" is 1000."""
    made = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=1, out_channels=1, num_layers=6, sample_size=32, patch_size=4,
        norm_num_groups=1, num_embeds_ada_norm=1000,
    )  # fmt: skip
    embeddings = made.transformer_blocks[0].norm1.emb
    # Every block of diffusers' DiT drops labels by dice of its own; no block would ever see the others without one, as guidance needs.
    embeddings.class_embedder.dropout_prob = 0.0
    table = embeddings.class_embedder.embedding_table.weight
    nn.init.normal_(table)  # in such a trial 78 %, from the paper's deviation of 0.02 50 %
    table.data[len(fashion.CLASSES) : NO_CLASS] = 0
    for block in made.transformer_blocks:
        # As in the paper (arXiv:2212.09748) a block begins as the identity, and all blocks learn one embedding of step and class.
        block.norm1.linear.weight.data.zero_()
        block.norm1.linear.bias.data.zero_()
        block.norm1.emb = embeddings
    for layer in (made.proj_out_1, made.proj_out_2):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    return made


def main() -> None:
    """Train and save."""
    how, data = arguments(__doc__, IMAGES)
    how = replace(how, batch=BATCH, floor=FLOOR)
    torch.manual_seed(how.seed)
    transformer = build()
    for block in transformer.transformer_blocks:
        # Attention written out takes half of the time of torch's fused one on a CPU at this size, backward pass included.
        block.attn1.set_processor(AttnProcessor())
    dice = torch.Generator().manual_seed(how.seed)

    def predict(noisy: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        dropped = torch.rand(len(labels), generator=dice) < UNLABELLED
        return transformer(noisy, timestep=steps, class_labels=labels.masked_fill(dropped, NO_CLASS)).sample

    train(transformer, predict, *fashion.load("train", data), how)
    for block in transformer.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)  # files hold no tensor twice under two names
    # Half of an image is black, the end of the range: clipping there moves the mean, and the more steps the further.
    pipeline = DiTPipeline(transformer=transformer, vae=unchanging_autoencoder(), scheduler=sampler(clip=False))
    pipeline.register_to_config(id2label={str(number): name for number, name in enumerate(fashion.CLASSES)})
    pipeline.to(torch.float16).save_pretrained(OUTPUT)


if __name__ == "__main__":
    main()
