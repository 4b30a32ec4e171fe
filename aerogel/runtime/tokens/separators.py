"""Separators among the tokens of an image: positions that hold no feature but a vector of the model, as at the end of each line of tiles.

B rows, N positions of a forward, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import Decoder


def separators(network: Network, decoder: Decoder) -> tuple[str, ...]:
    """Return the full names of the vectors that may separate tokens of images.

    They are of the decoder's width, and a module around other modules has them, where norms and linear layers have theirs in themselves.
    """
    width = network.config.get_text_config().hidden_size
    towers = tuple(f"{block}." for tower in network.towers for block in tower.blocks)
    found: list[str] = []
    for prefix, module in network.module.named_modules():
        if f"{prefix}.".startswith((*towers, f"{decoder.module}.")) or not list(module.children()):
            continue
        names = [name for name, vector in module.named_parameters(prefix, recurse=False) if vector.shape == (width,)]
        found += names
    return tuple(found)


def at_separators(embedded_BNC: Tensor, vision_BN: Tensor, vectors: Iterable[Tensor]) -> Tensor:
    """Return a mask of the image tokens whose embedding is one of these vectors."""
    at_BN = torch.zeros_like(vision_BN)
    for vector_C in vectors:
        at_BN |= (embedded_BNC == vector_C.to(embedded_BNC)).all(-1)
    return at_BN & vision_BN
