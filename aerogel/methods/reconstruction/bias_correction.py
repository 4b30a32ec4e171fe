"""Bias correction: pruned layers give the mean output that they gave in the original model (after arXiv:1906.04721)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.methods.base import Before
from aerogel.methods.reconstruction.policy import ReconstructionMethod, original_of
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.units import captured, rows_of
from aerogel.model.walk import blocks_of


@dataclass(frozen=True)
class BiasCorrection(ReconstructionMethod):
    """Moves the biases of pruned layers so that the mean of each output channel is that of the original model."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for a bias."""
        yield from super().problems(network, before)
        found = [layer for block in blocks_of(network) for layer in self.targeted(block).values()]
        if found and all(layer.bias is None for layer in found):
            yield "finds no bias to move: no layer that it acts on has one; leave it out"

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Correct one layer after the other, each on what those before it give by now; layers without a bias are left."""
        layers = {name: layer for name, layer in self.pruned(block).items() if layer.bias is not None}
        order = [*rows_of(block, layers)] if layers else []
        for name in order:
            layer, own = layers[name], original_of(block).module.get_submodule(name)
            _, sparse = captured(block, None, layer)
            _, dense = captured(original_of(block), None, own)
            if not sparse or not dense:
                block.note(name, fallback="bias not corrected: no token reached it in the original model")
                continue
            shift_O = (channel_mean(dense) - channel_mean(sparse)).to(layer.weight.device)
            assert layer.bias is not None, "chosen by it"
            layer.bias.add_(shift_O.to(layer.bias.dtype))
            block.note(name, bias_shift=float(shift_O.norm()))
        for name in layers.keys() - set(order):
            block.note(name, fallback="bias not corrected: no token reached it")


def channel_mean(outputs: list[Tensor]) -> Tensor:
    """Return the mean of each channel over all that a layer gave: (..., O) of a linear layer, (N, O, H, W) of a convolution."""
    last = [output.movedim(1, -1) if output.ndim == 4 else output for output in outputs]
    rows = [each.reshape(-1, each.shape[-1]) for each in last]
    total_O = torch.stack([each.double().sum(0) for each in rows]).sum(0)
    return (total_O / sum(len(each) for each in rows)).float()
