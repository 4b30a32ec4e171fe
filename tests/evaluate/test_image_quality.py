"""Statistics of real images on disk, and the figures of images against them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, generate_images
from aerogel.errors import AerogelError
from aerogel.evaluate import features
from aerogel.evaluate.image_quality import ImageQuality
from aerogel.evaluate.reference import Reference
from aerogel.numerics.images import frechet, inception_score, moments, precision_recall
from tests.image_pipelines import classes, classifier, unconditional
from tests.tiny import FAMILIES

ZOO = Path(__file__).parents[2] / "zoo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("networks") / "tiny-judge")


@pytest.fixture(scope="module")
def real() -> Tensor:
    return torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(folder: Path, real: Tensor) -> Path:
    path = folder.parent / "real.safetensors"
    Reference.of(features.load(str(folder)), real, "noise", kept=10).save(path)
    return path


def test_statistics_come_back_as_they_were(folder: Path, file: Path, real: Tensor) -> None:
    network = features.load(str(folder))
    found, sight = Reference.load(file), network.look(real)
    assert (found.about, found.network, found.images, found.pixels) == ("noise", "tiny-judge", 40, "8x8")
    for kept, rows in ((found.features, sight.features_ND), (found.spatial, sight.spatial_NS)):
        exact = moments(rows)
        torch.testing.assert_close(kept.mean_D, exact.mean_D, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kept.covariance_DD, exact.covariance_DD, rtol=1e-5, atol=1e-6)
    assert found.features_MD.shape == (10, 16)
    torch.testing.assert_close(found.features_MD[[0, -1]], sight.features_ND[[0, -1]].double(), rtol=1e-3, atol=1e-3)
    found.check(network)


def test_statistics_of_another_network_are_refused(folder: Path, file: Path, tmp_path: Path) -> None:
    found = Reference.load(file)
    with pytest.raises(AerogelError, match="the statistics of real images are of tiny-judge, not of tiny-judge@4"):
        found.check(features.load(f"{folder}@4"))
    with pytest.raises(AerogelError, match="tiny-judge has other weights"):
        found.check(features.load(str(classifier(tmp_path / "tiny-judge", seed=1))))


def test_files_that_hold_no_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="is no file"):
        Reference.load(tmp_path / "nowhere")
    save_file({"images": torch.zeros(1)}, tmp_path / "images.safetensors")
    with pytest.raises(AerogelError, match="holds no statistics of real images"):
        Reference.load(tmp_path / "images.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(AerogelError, match="holds no statistics of real images"):
        Reference.load(tmp_path / "broken.safetensors")


def test_figures_are_those_of_the_pictures(folder: Path, file: Path, real: Tensor) -> None:
    options = ImageQuality(features=str(folder), reference=file, count=7, steps=2, batch=3, seed=3, guidance=1.5)
    found = options.measure(aerogel.load(classes()))
    network = features.load(str(folder))
    made = list(generate_images(classes(), Denoising(count=7, steps=2, batch=7, guidance=1.5), seed=3))
    ours, theirs = network.look(made[0].images_NCHW), network.look(real)
    kept = theirs.features_ND[torch.linspace(0, 39, 10).long()].half()
    precision, recall = precision_recall(kept, ours.features_ND)
    asked = torch.tensor([network.labels[name] for name in ("cat", "dog", "cat", "dog", "cat", "dog", "cat")])
    expected = {
        "frechet": frechet(moments(theirs.features_ND), moments(ours.features_ND)),
        "spatial_frechet": frechet(moments(theirs.spatial_NS), moments(ours.spatial_NS)),
        "inception_score": inception_score(ours.logits_NK),
        "precision": precision,
        "recall": recall,
        "accuracy": float((ours.logits_NK.argmax(1) == asked).double().mean()),
    }
    assert {name: found[f"{name}[tiny-judge]"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert {name: found[name] for name in ("count", "steps", "guidance", "seed", "reference", "real_images")} == {
        "count": 7, "steps": 2, "guidance": 1.5, "seed": 3, "reference": "noise", "real_images": 40,
    }  # fmt: skip


def test_without_subjects_there_is_no_accuracy(folder: Path, file: Path) -> None:
    found = ImageQuality(features=str(folder), reference=file, count=5, steps=2).measure(aerogel.load(unconditional()))
    assert "recall[tiny-judge]" in found
    assert not any(name.startswith("accuracy") for name in found)


def test_what_is_lacking_is_named(folder: Path, file: Path, tmp_path: Path) -> None:
    network = aerogel.load(classes())
    with pytest.raises(AerogelError, match=r"image_quality.reference=FILE"):
        ImageQuality().measure(network)
    with pytest.raises(AerogelError, match="came without its pipeline"):
        ImageQuality(features=str(folder), reference=file).measure(aerogel.load(FAMILIES["dit"].build()))
    with pytest.raises(AerogelError, match="each is at least 1"):
        ImageQuality(features=str(folder), reference=file, count=0).measure(network)
    with pytest.raises(AerogelError, match="a 3-th neighbour needs more than 3 of each"):
        ImageQuality(features=str(folder), reference=file, count=3, steps=1).measure(network)
    Reference.of(features.load(str(folder)), torch.rand(5, 3, 16, 16), "larger").save(tmp_path / "larger")
    with pytest.raises(AerogelError, match="images are 8x8 and the real images 16x16"):
        ImageQuality(features=str(folder), reference=tmp_path / "larger", count=4, steps=1).measure(network)


def test_a_broken_network_is_called_that(folder: Path, file: Path) -> None:
    pipeline = classes()
    pipeline.transformer.proj_out_2.weight.data.fill_(float("nan"))
    with pytest.raises(AerogelError, match="NaN pixels"):
        ImageQuality(features=str(folder), reference=file, count=4, steps=1).measure(aerogel.load(pipeline))


@pytest.mark.quality
@pytest.mark.parametrize("name", ["fashion-judge", pytest.param("efficientnet-lite0@128", marks=pytest.mark.slow)])
def test_real_images_lie_among_those_of_the_zoo_and_noise_does_not(name: str) -> None:
    real = Reference.load(ZOO / "reference" / f"{name}.safetensors")
    network = features.load(str(ZOO / name) if name == "fashion-judge" else name)
    real.check(network)
    kept = load_file(ZOO / "reference" / "images.safetensors")
    images = (kept["images_NCHW"] / 255)[::2]
    distances, among = [], []
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for shown in (images, 0.8 * images + 0.2 * noise, noise):
        sights = [network.look(some) for some in shown.split(8)]
        features_ND = torch.cat([sight.features_ND for sight in sights])
        distances.append(frechet(real.features, moments(features_ND)))
        among.append(precision_recall(real.features_MD, features_ND))
    assert distances[0] * 3 < distances[1] < distances[2], distances
    assert min(among[0]) > 0.75
    # Precision alone does not tell: one real image far from all others reaches far, with the judge as far as to noise.
    assert among[2].recall == 0


@pytest.mark.slow
@pytest.mark.quality
def test_the_judge_sees_what_the_zoo_was_asked_for() -> None:
    prompts = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    judge = {"features": str(ZOO / "fashion-judge"), "reference": ZOO / "reference" / "fashion-judge.safetensors"}
    network = aerogel.load(ZOO / "fashion-unet")
    found = ImageQuality(**judge, prompts=prompts, count=10, steps=10, guidance=2.0).measure(network)
    assert found["accuracy[fashion-judge]"] >= 0.8
    wrong = ImageQuality(**judge, prompts=prompts[::-1], count=10, steps=10, guidance=2.0).measure(network)
    assert wrong["accuracy[fashion-judge]"] >= 0.8, "accuracy follows the prompts"
    assert found["precision[fashion-judge]"] >= 0.6
