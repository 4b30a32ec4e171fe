"""Images of the same seed: figures by hand, pairs as they were made, what cannot be compared."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, generate_images
from aerogel.engine.scores import measure
from aerogel.errors import AerogelError
from aerogel.evaluate import features
from aerogel.evaluate.image_similarity import ImageSimilarity, png
from aerogel.numerics.images import ssim
from tests.image_pipelines import classes, classifier, unconditional


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("networks") / "tiny-judge")


def drawn(seed: int) -> Tensor:
    (made,) = generate_images(classes(seed), Denoising(count=5, steps=2, batch=5))
    return made.images_NCHW


def decoded(text: str) -> Tensor:
    shades = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return torch.from_numpy(shades.copy()) / 255


def test_figures_are_those_of_the_pictures(folder: Path) -> None:
    options = ImageSimilarity(features=str(folder), count=5, steps=2, batch=2, kept=3)
    found = options.measure(aerogel.load(classes(1)), aerogel.load(classes(0)))
    theirs, ours = drawn(0), drawn(1)
    mse = float((theirs - ours).square().mean())
    network = features.load(str(folder))
    assert found["mse"] == pytest.approx(mse, rel=1e-4)
    assert found["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-4)
    assert found["ssim"] == pytest.approx(float(ssim(theirs, ours).mean()), rel=1e-4)
    expected = float(features.distance(network.look(theirs), network.look(ours)).mean())
    assert found["perceptual[tiny-judge, unlearned]"] == pytest.approx(expected, rel=1e-4)
    assert [pair["subject"] for pair in found["pairs"]] == ["cat", "dog", "cat"]
    for number, pair in enumerate(found["pairs"]):
        torch.testing.assert_close(decoded(pair["original"]).permute(2, 0, 1), theirs[number], atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(decoded(pair["compressed"]).permute(2, 0, 1), ours[number], atol=0.51 / 255, rtol=0)


def test_a_network_is_equal_to_itself(folder: Path) -> None:
    network = aerogel.load(unconditional())
    shown = dict(getattr(network.processor, "_progress_bar_config", {}))
    found = ImageSimilarity(features=str(folder), count=2, steps=2).measure(network, network)
    assert (found["mse"], found["psnr"], found["perceptual[tiny-judge, unlearned]"]) == (0, math.inf, 0)
    assert found["ssim"] == pytest.approx(1)
    assert network.processor._progress_bar_config == shown


def test_grey_pictures_are_kept_grey_and_large_ones_small() -> None:
    ramp = torch.linspace(0, 1, 16).reshape(1, 4, 4)
    torch.testing.assert_close(decoded(png(ramp)), ramp[0], atol=0.51 / 255, rtol=0)
    assert decoded(png(torch.rand(3, 300, 600))).shape == (128, 256, 3)


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    with pytest.raises(AerogelError, match="image_similarity compares with the original"):
        ImageSimilarity(features=str(folder)).measure(aerogel.load(classes()))


def test_images_are_made_when_asked_for_and_options_are_set(folder: Path) -> None:
    ours, theirs = aerogel.load(classes(1)), aerogel.load(classes(0))
    assert set(measure(ours, theirs)["compressed"]) == {"size"}
    sets = [f"image_similarity.features={folder}", "image_similarity.count=2", "image_similarity.steps=1", "image_similarity.kept=0"]
    found = measure(ours, theirs, ["image_similarity"], overrides=sets)
    assert set(found["original"]) == set()
    assert (found["compressed"]["image_similarity"]["count"], found["compressed"]["image_similarity"]["pairs"]) == (2, [])


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ("image_similarity.cuont=2", "measure 'image_similarity': unknown option 'cuont'; did you mean count"),
        ("image_similarity.count=many", "measure 'image_similarity': option 'count': Input should be a valid integer"),
        ("image_quality.count=2", "an option of 'image_quality' is set, but that measure is not taken; did you mean image_similarity"),
        ("count=2", "cannot read override 'count=2'; expected measure.option=value"),
    ],
)
def test_options_that_are_not_there_are_named(sets: str, reason: str) -> None:
    network = aerogel.load(unconditional())
    with pytest.raises(AerogelError, match=reason):
        measure(network, network, ["image_similarity"], overrides=[sets])
