"""Statistics of real images as a feature network sees them, and the features of some, in one safetensors file.

N images, M of them whose features are kept, D features, S values of a few spatial channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.evaluate.features import FeatureNetwork
from aerogel.numerics.images import Moments, moments

_TENSORS = ("mean_D", "covariance_DD", "spatial_mean_S", "spatial_covariance_SS", "features_MD")
_FACTS = ("about", "network", "fingerprint", "images", "pixels")


@dataclass(frozen=True)
class Reference:
    """Statistics of real images under one feature network."""

    about: str
    """Name of the set of images."""
    network: str
    fingerprint: str
    """That of the network's weights."""
    images: int
    """Number of images behind the statistics."""
    pixels: str
    """Height x width of the images."""
    features: Moments
    spatial: Moments
    features_MD: Tensor
    """Features of some images, which precision and recall compare with."""

    @classmethod
    def of(cls, network: FeatureNetwork, images_NCHW: Tensor, about: str, kept: int = 500, batch: int = 8) -> Reference:
        """Look at real images in [0, 1]; the features of `kept` of them, spread evenly over all, are kept.

        Raises AerogelError for fewer than two images.
        """
        features_ND, spatial_NS = seen(network, images_NCHW.split(batch))
        chosen_M = torch.linspace(0, len(features_ND) - 1, min(kept, len(features_ND))).long()
        return cls(
            about, network.name, network.fingerprint, len(images_NCHW), pixels(images_NCHW),
            moments(features_ND), moments(spatial_NS), features_ND[chosen_M],
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the file: statistics in float32, kept features in float16."""
        tensors = dict(zip(_TENSORS, (*self.features, *self.spatial, self.features_MD), strict=True))
        stored = {name: tensor.to(torch.float16 if name == "features_MD" else torch.float32) for name, tensor in tensors.items()}
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path, {name: str(getattr(self, name)) for name in _FACTS})

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read the file; raises AerogelError when it is missing or not such a file."""
        if not Path(path).is_file():
            raise AerogelError(f"{path} is no file; give the statistics of real images that Reference.save wrote")
        try:
            with safe_open(path, "pt") as file:
                facts, found = file.metadata() or {}, {name: file.get_tensor(name).double() for name in _TENSORS}
            given = {name: facts[name] for name in _FACTS}
            count = int(given.pop("images"))
        except (SafetensorError, KeyError, ValueError) as error:
            raise AerogelError(f"{path} holds no statistics of real images ({error}); write it with Reference.save") from error
        mean_D, covariance_DD, spatial_mean_S, spatial_covariance_SS, features_MD = (found[name] for name in _TENSORS)
        return cls(
            **given, images=count, features=Moments(mean_D, covariance_DD),
            spatial=Moments(spatial_mean_S, spatial_covariance_SS), features_MD=features_MD,
        )  # fmt: skip

    def check(self, network: FeatureNetwork) -> None:
        """Raise AerogelError unless the statistics are those of this network."""
        if self.network != network.name:
            raise AerogelError(
                f"the statistics of real images are of {self.network}, not of {network.name}; give features={self.network}, or its folder"
            )
        if self.fingerprint != network.fingerprint:
            raise AerogelError(f"{network.name} has other weights than when the statistics of real images were made; make them again")


def seen(network: FeatureNetwork, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (features_ND, spatial_NS) of images in [0, 1]."""
    # Maps of all images together would not fit into memory.
    sights = [network.look(images_NCHW)._replace(maps=()) for images_NCHW in batches]
    return torch.cat([sight.features_ND for sight in sights]), torch.cat([sight.spatial_NS for sight in sights])


def pixels(images_NCHW: Tensor) -> str:
    """Height x width."""
    return f"{images_NCHW.shape[2]}x{images_NCHW.shape[3]}"
