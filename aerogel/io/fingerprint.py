"""Fingerprint of the weights of a model, on disk or in memory, whatever dtype they are computed in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from aerogel.numerics.packing import raw_bytes


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`sha256:` over names, shapes and values of (full name, tensor) pairs that come in any order, one in memory at a time.

    Floats of 16 bits or more count as the bfloat16 that is nearest: a network is the same in the dtypes that checkpoints are opened in.
    Everything else counts by its dtype and its bytes.
    """
    digests = {name: _digest(tensor.detach()) for name, tensor in tensors}
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _digest(tensor: Tensor) -> str:
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = tensor.to(torch.bfloat16)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()
