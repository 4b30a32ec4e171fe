"""Figures of images: how far two are apart, and how far two sets of features are, whatever network gave them.

N images or rows of features, D features, K classes, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.errors import AerogelError


class Moments(NamedTuple):
    """The normal distribution that a set of features is taken for."""

    mean_D: Tensor
    covariance_DD: Tensor


@torch.no_grad()
def moments(features_ND: Tensor) -> Moments:
    """Return mean and unbiased covariance in float64; raises AerogelError for fewer than two rows."""
    if len(features_ND) < 2:
        raise AerogelError(f"{len(features_ND)} images have no covariance; at least 2 are expected")
    wide_ND = features_ND.double()
    mean_D = wide_ND.mean(0)
    centred_ND = wide_ND - mean_D
    return Moments(mean_D, centred_ND.T @ centred_ND / (len(wide_ND) - 1))


@torch.no_grad()
def frechet(one: Moments, other: Moments) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Fréchet distance of two normal distributions.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which needs no root of a matrix that is not symmetric.
    """
    roots = [_root(moment.covariance_DD.double()) for moment in (one, other)]
    shared = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    spread = one.covariance_DD.double().trace() + other.covariance_DD.double().trace() - 2 * shared
    # Of two equal sets nothing is left but rounding, which may fall below zero.
    return max(0.0, float((one.mean_D.double() - other.mean_D.double()).square().sum() + spread))


def _root(symmetric_DD: Tensor) -> Tensor:
    """The root of a positive semidefinite matrix; eigenvalues that rounding brought below zero count as zero."""
    values_D, vectors_DD = torch.linalg.eigh(symmetric_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T


@torch.no_grad()
def inception_score(logits_NK: Tensor) -> float:
    """Return exp of the mean KL(p(class | image) || p(class)) over all images in one split: between 1 and K."""
    log_NK = logits_NK.double().log_softmax(-1)
    log_K = log_NK.logsumexp(0) - math.log(len(log_NK))
    return float((log_NK.exp() * (log_NK - log_K)).sum(-1).mean().exp())


class PrecisionRecall(NamedTuple):
    """Both are shares, 0 to 1."""

    precision: float
    """Generated images that lie among the real ones."""
    recall: float
    """Real images that lie among the generated ones."""


@torch.no_grad()
def precision_recall(real_ND: Tensor, generated_ND: Tensor, k: int = 3) -> PrecisionRecall:
    """Return improved precision and recall (arXiv:1904.06991): shares of one set inside a ball of the other set.

    The ball around a point reaches to its k-th nearest neighbour in its own set. Raises AerogelError for sets of k rows or fewer.
    """
    if min(len(real_ND), len(generated_ND)) <= k:
        raise AerogelError(f"{len(real_ND)} real and {len(generated_ND)} generated images; a {k}-th neighbour needs more than {k} of each")
    real_ND, generated_ND = real_ND.double(), generated_ND.double()
    return PrecisionRecall(_among(generated_ND, real_ND, k), _among(real_ND, generated_ND, k))


def _among(points_ND: Tensor, others_MD: Tensor, k: int) -> float:
    """The share of points inside a ball of the others."""
    # Differences, not the expanded square: a point is at distance exactly 0 from itself.
    mode = "donot_use_mm_for_euclid_dist"
    reach_M = torch.cdist(others_MD, others_MD, compute_mode=mode).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(points_ND, others_MD, compute_mode=mode) <= reach_M).any(1).double().mean())


@torch.no_grad()
def psnr(mse: float) -> float:
    """Return 10 log10(1 / mse) in decibels for pixels from 0 to 1; infinite when nothing differs."""
    return -10 * math.log10(mse) if mse else math.inf


@torch.no_grad()
def ssim(images_NCHW: Tensor, others_NCHW: Tensor) -> Tensor:
    """Return the structural similarity of each pair (N) of images from 0 to 1, by torchmetrics: 11x11 Gaussian window of width 1.5.

    Raises AerogelError when torchmetrics is missing or the images are smaller than 6 pixels.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise AerogelError("structural similarity needs torchmetrics: pip install 'aerogel[images]'") from error
    if min(images_NCHW.shape[-2:]) < 6:
        raise AerogelError(f"images of {images_NCHW.shape[-1]} x {images_NCHW.shape[-2]} pixels have no structure; 6 x 6 are expected")
    found = structural_similarity_index_measure(images_NCHW.double(), others_NCHW.double(), data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)


@torch.no_grad()
def map_distance(maps_NCHW: Tensor, others_NCHW: Tensor) -> Tensor:
    """Return the squared distance of feature maps of each pair (N), each position's channels scaled to length 1, mean over positions.

    This is LPIPS (arXiv:1801.03924) at one depth with all channel weights 1: 0 for equal maps, at most 4.
    """
    ours, theirs = (torch.nn.functional.normalize(maps.double(), dim=1, eps=1e-10) for maps in (maps_NCHW, others_NCHW))
    return (ours - theirs).square().sum(1).mean((1, 2))
