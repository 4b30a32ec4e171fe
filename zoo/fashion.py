"""Fashion-MNIST (MIT licence, arXiv:1708.07747) at 32x32, as the small image models learn it.

The files are those of Debian's package `dataset-fashion-mnist`: `apt install` it, or unpack it and name the folder.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def load(split: str, folder: Path = INSTALLED) -> tuple[Tensor, Tensor]:
    """Return the (images_N1HW, labels_N) of "train" or "t10k": floats in [-1, 1], a dark border brings 28 pixels to 32."""
    images = _idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz")
    scaled = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    return pad(scaled, (2, 2, 2, 2), value=-1.0), torch.from_numpy(labels.astype(np.int64))


def _idx(path: Path) -> np.ndarray:
    """The array in a file of the IDX format: two zero bytes, the type (8: bytes), the rank, the sizes in big-endian."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: apt install dataset-fashion-mnist, or give the folder with --data")
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\0\0\x08", f"{path} holds no bytes in the IDX format"
    rank = raw[3]
    sizes = np.frombuffer(raw, ">u4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
