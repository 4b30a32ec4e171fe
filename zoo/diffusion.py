"""How the small diffusion models are trained: v-prediction under a cosine schedule, min-SNR weights, an average of the weights.

v-prediction: arXiv:2202.00512; the schedule: arXiv:2102.09672; min-SNR weights: arXiv:2303.09556.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fashion
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy images_NCHW, steps_N, labels_N) -> the predicted v_NCHW."""


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    images: int = 300_000
    batch: int = 64
    rate: float = 5e-4
    """Peak learning rate; it rises over the first 300 steps and falls to zero along a cosine."""
    average: float = 0.999
    """Share of the averaged weights that a step leaves as it was."""
    gamma: float = 5.0
    """Signal-to-noise ratio from which on no step weighs more."""
    floor: float = 0.0
    """Added to the weights' ratio of signal to noise: with 0 the noisiest steps, which decide what an image shows, hardly count."""
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The share of the peak rate at a step."""
        return min(1.0, (step + 1) / 300) * (1 + math.cos(math.pi * step * self.batch / self.images)) / 2


def sampler(clip: bool = True) -> DDIMScheduler:
    """The sampler that the pipelines are saved with; its noise is the one of training."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=clip, timestep_spacing="trailing")


def arguments(about: str | None, images: int = Training.images) -> tuple[Training, Path]:
    """Read the command line of a training script, which learns from so many images if not told otherwise."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=images, help="Images to learn from, all passes together.")
    parser.add_argument("--data", type=Path, default=fashion.INSTALLED, help="Folder with the files of Fashion-MNIST.")
    given = parser.parse_args()
    return Training(images=given.images), given.data


def train(parts: nn.Module, predict: Predict, images: Tensor, labels: Tensor, how: Training) -> None:
    """Train the parameters of `parts` and leave their average in them."""
    generator = torch.Generator().manual_seed(how.seed)
    parameters = list(parts.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, how.rate_at)
    average = EMAModel(parameters, decay=how.average, use_ema_warmup=True, power=0.75, foreach=True)
    noises = sampler()
    parts.train()
    start, recent = time.perf_counter(), []
    for step in range(how.images // how.batch):
        chosen = torch.randint(len(images), (how.batch,), generator=generator)
        clean, steps = images[chosen], torch.randint(noises.config.num_train_timesteps, (how.batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(noises.add_noise(clean, noise, steps), steps, labels[chosen])
        snr = compute_snr(noises, steps)
        errors = (predicted.float() - noises.get_velocity(clean, noise, steps)).square().mean((1, 2, 3))
        loss = (errors * (snr.clamp(max=how.gamma) + how.floor) / (snr + 1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        recent.append(loss.item())
        if step % 100 == 99:
            done = (step + 1) * how.batch
            pace = done / (time.perf_counter() - start)
            print(f"{done:,} images, {pace:.0f} a second, loss {sum(recent) / len(recent):.4f}", flush=True)
            recent = []
    average.copy_to(parameters)
    parts.eval()


def unchanging_autoencoder() -> AutoencoderKL:
    """An autoencoder that gives back what it gets, so that a model of pixels is a standard latent pipeline.

    In the last layers silu(x) - silu(-x) = x; two channels of +-2048 beside them keep the variance of the group norm at 2048^2 / 4.
    """
    made = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=1, scaling_factor=1.0,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, sample_size=32,
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data.zero_()
    for side in (made.encoder, made.decoder):
        side.conv_in.weight.data[:2, 0, 1, 1] = torch.tensor([1.0, -1.0])
        side.conv_in.bias.data[2:4] = torch.tensor([2048.0, -2048.0])
        side.conv_norm_out.weight.data[:2] = 1024.0
        side.conv_out.weight.data[0, :2, 1, 1] = torch.tensor([1.0, -1.0])
    made.encoder.conv_out.bias.data[1] = -30.0  # the logarithm of a variance of nothing
    return made.eval()
