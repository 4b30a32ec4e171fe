"""Losses between a student and its teacher: outputs, features or distributions; every loss is a scalar in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized_mse(output: Tensor, target: Tensor) -> Tensor:
    """Return |output - target|^2 over |target|^2, so that losses of different blocks compare; any shape, both the same."""
    target = target.float()
    power = target.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (output.float() - target).square().sum() / power


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) in nats at temperature T, mean over tokens (arXiv:1503.02531); logits are (..., vocabulary).

    The factor T^2 keeps gradients of the same size whatever the temperature.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean() * temperature**2


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine between feature vectors (last dimension), mean over all others; blind to their length."""
    return 1 - torch.cosine_similarity(output.float(), target.float(), dim=-1).mean()
