"""What the test images of Fashion-MNIST look like to feature networks: `python zoo/reference.py` writes zoo/reference, in 5 minutes.

Statistics are of all 10,000 images at 32x32, a dark border around 28x28, as the models of the zoo learn them. With --check it
prints how far two halves of them are from each other, which no model can be expected to beat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fashion
import torch
from safetensors.torch import save_file

from aerogel.evaluate import features
from aerogel.evaluate.reference import Reference, seen
from aerogel.numerics.images import frechet, moments, precision_recall

HERE = Path(__file__).parent
NETWORKS = (str(HERE / "fashion-judge"), "efficientnet-lite0@128")
IMAGES = 300
"""Images that are kept themselves, spread evenly over the test set."""


def main() -> None:
    """Look at the images and write the files, or compare halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.INSTALLED, help="Folder with the files of Fashion-MNIST.")
    parser.add_argument("--check", action="store_true", help="Compare two halves of the images instead.")
    given = parser.parse_args()
    images, labels = fashion.load("t10k", given.data)
    images = (images + 1) / 2
    if given.check:
        halves(images)
        return
    (HERE / "reference").mkdir(exist_ok=True)
    for name in NETWORKS:
        network = features.load(name)
        Reference.of(network, images, "the test set of Fashion-MNIST").save(HERE / "reference" / f"{network.name}.safetensors")
    chosen = torch.linspace(0, len(images) - 1, IMAGES).long()
    shades = (images[chosen] * 255).round().to(torch.uint8)
    save_file({"images_NCHW": shades.contiguous(), "labels_N": labels[chosen]}, HERE / "reference" / "images.safetensors")


def halves(images: torch.Tensor) -> None:
    """Print the figures of every second image against the others."""
    for name in NETWORKS:
        network = features.load(name)
        features_ND, spatial_NS = seen(network, images.split(8))
        pairs = [(rows[::2], rows[1::2]) for rows in (features_ND, spatial_NS)]
        plain, spatial = (frechet(moments(one), moments(other)) for one, other in pairs)
        among = precision_recall(features_ND[::20], features_ND[1::40])
        print(f"{network.name}: frechet {plain:.4f}, spatial {spatial:.4f}, {among}")


if __name__ == "__main__":
    main()
