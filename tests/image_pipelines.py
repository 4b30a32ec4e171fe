"""Tiny pipelines that make images, and a tiny classifier that looks at them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers


def unconditional() -> diffusers.DDIMPipeline:
    """A pipeline of pixels that takes neither prompt nor class: 3 x 8 x 8."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


def classes(seed: int = 0, layers: int = 1) -> diffusers.DiTPipeline:
    """A pipeline that takes the classes cat (0) and dog (7): 3 x 8 x 8."""
    torch.manual_seed(seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers, sample_size=8, patch_size=2,
        norm_num_groups=4,
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(), id2label={"0": "cat", "7": "dog"})


def classifier(folder: Path, seed: int = 0, labels: tuple[str, ...] = ("dog, hound", "cat", "fish", "bird, hound")) -> Path:
    """Save a ResNet for three channels, with random norms, that knows four classes."""
    torch.manual_seed(seed)
    made = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], layer_type="basic",
            id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
        )
    )  # fmt: skip
    for name, tensor in made.state_dict().items():
        if name.endswith(("running_mean", "normalization.bias")):
            tensor.normal_(0, 0.1)
    made.save_pretrained(folder)
    return folder
