"""Trains zoo/fashion-judge, a small classifier of Fashion-MNIST whose features and verdicts grade generated images: ten minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

import fashion
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

OUTPUT = Path(__file__).parent / "fashion-judge"


def build() -> ResNetForImageClassification:
    """The network before training."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(fashion.CLASSES)),
            label2id={name: number for number, name in enumerate(fashion.CLASSES)},
        )
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to two pixels and, half of the time, mirrored."""
    down, right, mirrored = (int(torch.randint(high, (1,), generator=generator)) for high in (5, 5, 2))
    moved = images.roll((down - 2, right - 2), (2, 3))
    return moved.flip(3) if mirrored else moved


def main() -> None:
    """Train, print the accuracy on the test set, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--data", type=Path, default=fashion.INSTALLED)
    given = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge, batch = build(), 128
    images, labels = fashion.load("train", given.data)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=given.epochs * (len(images) // batch))
    for epoch in range(given.epochs):
        judge.train()
        for chosen in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = judge(shifted(images[chosen], generator)).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(judge, *fashion.load('t10k', given.data)):.4f} of the test set", flush=True)
    judge.half().save_pretrained(OUTPUT)


@torch.no_grad()
def accuracy(judge: ResNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    """The share of the images whose class the judge names."""
    judge.eval()
    right = [(judge(some).logits.argmax(-1) == true).float() for some, true in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(right).mean().item()


if __name__ == "__main__":
    main()
