"""Likeness of a model's images to real ones, as a feature network sees both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError
from aerogel.evaluate import features
from aerogel.evaluate.features import FeatureNetwork, Sight
from aerogel.evaluate.measure import ImageMeasure
from aerogel.evaluate.reference import Reference, pixels
from aerogel.model.network import Network
from aerogel.numerics.images import frechet, inception_score, moments, precision_recall
from aerogel.options import Count


@dataclass(frozen=True)
class ImageQuality(ImageMeasure):
    """Distances of images from real images: Fréchet, plain and spatial, precision and recall; inception score; accuracy.

    Every figure bears the name of its feature network and compares only with figures of the same network, the same real images and
    as many images: that of few images comes out too large.
    Accuracy is the share of images in which the network sees the class that was asked for, where prompts or labels name classes.
    """

    reference: str | Path | None = None
    """File with the statistics of real images, written by `Reference.save`."""
    count: Count = 256
    """Images; their noise differs, their prompts or labels take turns."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return frechet, spatial_frechet, inception_score, precision, recall, accuracy, each as NAME[NETWORK], and how they were made."""
        if self.reference is None:
            raise AerogelError("image_quality compares with real images; give the file with their statistics, image_quality.reference=FILE")
        real, judge = Reference.load(self.reference), features.load(self.features, network.device)
        real.check(judge)
        sights: list[Sight] = []
        subjects: list[str] = []
        for made in self.generated(network):
            if pixels(made.images_NCHW) != real.pixels:
                raise AerogelError(f"images are {pixels(made.images_NCHW)} and the real images {real.pixels}; compare equal sizes")
            # Maps of all images together would not fit into memory.
            sights.append(judge.look(made.images_NCHW)._replace(maps=()))
            subjects += made.subjects
        found = figures(real, judge, sights, subjects)
        about = {"reference": real.about, "real_images": real.images}
        return {**{f"{name}[{judge.name}]": value for name, value in found.items()}, **self.conditions, **about}


def figures(real: Reference, judge: FeatureNetwork, sights: list[Sight], subjects: list[str]) -> dict[str, float]:
    """Return the figures of images that a judge has looked at; accuracy only where the subjects name classes."""
    features_ND = torch.cat([sight.features_ND for sight in sights])
    spatial_NS = torch.cat([sight.spatial_NS for sight in sights])
    logits_NK = torch.cat([sight.logits_NK for sight in sights])
    among = precision_recall(real.features_MD, features_ND)
    found = {
        "frechet": frechet(real.features, moments(features_ND)),
        "spatial_frechet": frechet(real.spatial, moments(spatial_NS)),
        "inception_score": inception_score(logits_NK),
        "precision": among.precision,
        "recall": among.recall,
    }
    if asked := features.asked_classes(judge, subjects):
        found["accuracy"] = float((logits_NK.argmax(1) == torch.tensor(asked)).double().mean())
    return found
