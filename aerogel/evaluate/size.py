"""Size of the weights on disk and in memory, by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aerogel.evaluate.measure import Measure
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network

PARTS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("quantized layers", (QuantLinear,)),
    ("unquantized layers", (nn.Linear, nn.Conv2d)),
    ("embeddings", (nn.Embedding,)),
)
REST = "norms and others"


@dataclass(frozen=True)
class Size(Measure):
    """Bytes of the weights on disk and in memory, in total and by part.

    A tensor that several modules share counts once, for the first of them. Parts are stored bytes: float tensors in the dtype they
    have on disk, everything else as it is.
    """

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return disk_bytes (of the safetensors files, None without a folder), memory_bytes, parameters, bits_per_weight and parts."""
        parts: Counter[str] = Counter()
        memory, parameters = 0, 0
        seen: set[int] = set()
        for module in network.module.modules():
            part = next((name for name, classes in PARTS if isinstance(module, classes)), REST)
            own = [tensor for tensor in _own(module, network) if id(tensor) not in seen]
            seen.update(map(id, own))
            memory += sum(tensor.nbytes for tensor in own)
            parts[part] += sum(_stored(tensor, network) for tensor in own)
            parameters += _logical(module, own)
        stored = sum(parts.values())
        return {
            "disk_bytes": _on_disk(network),
            "memory_bytes": memory,
            "stored_bytes": stored,
            "parameters": parameters,
            "bits_per_weight": 8 * stored / max(parameters, 1),
            "parts": {name: parts[name] for name in (*(name for name, _ in PARTS), REST) if parts[name]},
        }


def _own(module: nn.Module, network: Network) -> list[Tensor]:
    """The tensors that a module itself puts on disk, not its children's."""
    persistent = [t for name, t in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
    return [*module.parameters(recurse=False), *persistent]


def _stored(tensor: Tensor, network: Network) -> int:
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return tensor.numel() * network.stored_dtype.itemsize if wide and network.stored_dtype else tensor.nbytes


def _logical(module: nn.Module, own: list[Tensor]) -> int:
    if isinstance(module, QuantLinear):
        return module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    return sum(tensor.numel() for tensor in own if isinstance(tensor, nn.Parameter))


def _on_disk(network: Network) -> int | None:
    files = list(network.origin.glob("*.safetensors")) if network.origin else []
    return sum(file.stat().st_size for file in files) if files else None
