"""Distances between tensors: numbers for journals, reports and tests, accumulated in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> float:
    """Return KL(p || q) in nats, mean over tokens; logits are (..., vocabulary) and p is the original's.

    A token that p rules out adds nothing, whatever q says of it.
    """
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1).mean())


@torch.no_grad()
def top1_agreement(logits_p: Tensor, logits_q: Tensor) -> float:
    """Return the share of tokens (0 to 1) whose most likely successor is the same."""
    return float((logits_p.argmax(-1) == logits_q.argmax(-1)).float().mean())


@torch.no_grad()
def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """Return ||exact - approximate|| / ||exact||; 0 when both are all zeros, infinite when only `exact` is."""
    exact, error = exact.float(), approximate.float() - exact.float()
    size, distance = float(exact.norm()), float(error.norm())
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


@torch.no_grad()
def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """Return the power of the signal over that of the error, in decibels; infinite when they are equal."""
    ratio = torch.tensor(relative_error(exact, approximate), dtype=torch.float64)
    return float(-20 * ratio.log10())


@torch.no_grad()
def cosine(exact: Tensor, approximate: Tensor) -> float:
    """Return the cosine of the angle between two tensors read as one long vector each."""
    return float(torch.cosine_similarity(exact.double().flatten(), approximate.double().flatten(), dim=0))
