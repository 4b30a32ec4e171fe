"""Figures of images against torchmetrics, closed forms and literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from aerogel.errors import AerogelError
from aerogel.numerics.images import Moments, frechet, inception_score, map_distance, moments, precision_recall, psnr, ssim


class Rows(nn.Module):
    """A feature network for torchmetrics whose features are the images."""

    num_features = 6

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def normal(count: int, seed: int = 0, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + seed


def test_moments_are_those_of_torch() -> None:
    rows = normal(50)
    found = moments(rows)
    torch.testing.assert_close(found.mean_D, rows.double().mean(0))
    torch.testing.assert_close(found.covariance_DD, torch.cov(rows.double().T))
    with pytest.raises(AerogelError, match="1 images have no covariance"):
        moments(rows[:1])


@pytest.mark.parametrize("count", [4, 200])
def test_frechet_is_that_of_torchmetrics(count: int) -> None:
    """With 4 images in 6 dimensions a covariance is singular."""
    real, made = normal(200), normal(count, seed=1)
    theirs = FrechetInceptionDistance(feature=Rows(), normalize=True, input_img_size=(1, 1, 6)).set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(made.double(), real=False)
    # The root of a singular product is good to half the digits.
    assert frechet(moments(real), moments(made)) == pytest.approx(float(theirs.compute()), rel=1e-6 if count > 6 else 1e-4)


def test_frechet_of_diagonal_normals_is_a_sum() -> None:
    deviations = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 1.0]])
    one, other = (Moments(torch.full((3,), float(number)), row.square().diag()) for number, row in enumerate(deviations))
    assert frechet(one, other) == pytest.approx(3 + 4 + 2.25 + 1)


@given(st.integers(0, 2**31), st.floats(0.1, 3.0))
@settings(max_examples=25, deadline=None)
def test_frechet_is_symmetric_and_unmoved_by_rotation(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, made = torch.randn(30, 4, generator=generator), scale * torch.randn(20, 4, generator=generator) + 1
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    found = frechet(moments(real), moments(made))
    assert found >= 0
    assert found == pytest.approx(frechet(moments(made), moments(real)), rel=1e-6)
    assert found == pytest.approx(frechet(moments(real @ turn), moments(made @ turn)), rel=1e-4)
    assert frechet(moments(real), moments(real)) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std\\(\\)")
def test_inception_score_is_that_of_torchmetrics() -> None:
    logits = 3 * normal(64)
    theirs = InceptionScore(feature=Rows(), splits=1)
    theirs.update(logits)
    assert inception_score(logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_inception_score_reaches_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(5)) == pytest.approx(5)


@given(st.integers(0, 2**31), st.integers(5, 12), st.integers(5, 12), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_precision_and_recall_are_those_of_plain_loops(seed: int, real_count: int, made_count: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, made = torch.randn(real_count, 2, generator=generator).double(), torch.randn(made_count, 2, generator=generator).double() * 1.5

    def share(points: Tensor, others: Tensor) -> float:
        inside = 0
        for point in points.tolist():
            balls = [(other, sorted(math.dist(other, third) for third in others.tolist())[k]) for other in others.tolist()]
            inside += any(math.dist(point, centre) <= radius for centre, radius in balls)
        return inside / len(points)

    found = precision_recall(real, made, k)
    assert found == pytest.approx((share(made, real), share(real, made)))


def test_precision_falls_for_strangers_and_recall_for_a_collapse() -> None:
    real = normal(100)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    collapsed = real[:1] + 1e-6 * normal(50, seed=2)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall < 0.05
    with pytest.raises(AerogelError, match="needs more than 3 of each"):
        precision_recall(real, real[:3])


def test_decibels() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0) == math.inf


def test_ssim_is_that_of_its_formula_for_flat_images() -> None:
    """Flat images have no contrast, so only the term of the means is left."""
    dark, light = torch.full((2, 1, 16, 16), 0.2), torch.full((2, 1, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(dark, light).tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert ssim(dark, dark).tolist() == pytest.approx([1, 1])
    assert ssim(dark[:1], light[:1]).shape == (1,)
    with pytest.raises(AerogelError, match="have no structure"):
        ssim(dark[..., :5], light[..., :5])


def test_map_distance_compares_directions() -> None:
    ours, theirs = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    ours[0, :, 0, 0], theirs[0, :, 0, 0] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    ours[0, :, 0, 1], theirs[0, :, 0, 1] = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    assert map_distance(ours, theirs).tolist() == pytest.approx([(2 + 0) / 2])
