"""Linear layers of a network whose zeros a kernel can leave out: their forwards are those kernels' for a while, where these are faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from aerogel.kernels.sparse_linear import SparseLinear
from aerogel.model.hooks import patch_forward


class SparseLayers:
    """The float linear layers of a network that have such zeros, with what is packed of them; the network itself stays as it is."""

    def __init__(self, module: nn.Module) -> None:
        """Look at the zeros of each layer, once."""
        self.layers: dict[nn.Module, SparseLinear] = {}
        for layer in module.modules():
            if type(layer) is nn.Linear and (found := SparseLinear.of(layer.weight, layer.bias, layer.weight.dtype)) is not None:
                self.layers[layer] = found

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the kernels multiply inside the context; afterwards every forward is what it was."""
        with patch_forward({layer: _forward(sparse) for layer, sparse in self.layers.items()}):
            yield


def _forward(sparse: SparseLinear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - code of models may give it by the name that nn.Linear has
        return sparse(input)

    return forward
