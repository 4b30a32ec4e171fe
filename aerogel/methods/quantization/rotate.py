"""Rotate: spread outliers over all channels with an orthogonal matrix folded through the residual stream.

Every block reads the stream through a norm and adds to it through a linear, so a rotation of the stream cancels inside the network:
weights change, the function does not (SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456). Weights and inputs that are easier to
quantize are what is left.

Legend: O outputs, I inputs, C channels of the stream, R = rotation_CC. Stream vectors are rows: x becomes x R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.edges import Edge
from aerogel.model.network import Network
from aerogel.model.structure.residual import Residual
from aerogel.numerics.rotation import ROTATIONS, apply_rotation
from aerogel.options import Seed


@dataclass(frozen=True)
class Rotate(Method):
    """Rotates the residual stream without changing the function, so that weights quantize better (arXiv:2404.00456)."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"residual", "uncached", "dense"})
    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "blocks"

    kind: Literal["hadamard", "random"] = "hadamard"
    """Rotation: a Hadamard matrix with random signs spreads most evenly; a random orthogonal one exists for every width."""
    seed: Seed = 0
    """Seed of the random signs or of the random matrix."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for the stream, and for a part of it that is quantized by then."""
        found = list(reasons(lambda: stream_of(network)))
        if quantized := [] if found else sorted({*before.quantized} & {*stream_of(network).writers, *stream_of(network).readers}):
            found = [f"cannot rotate: {quantized[0]} is quantized by then; put rotate first"]
        yield from found

    def remarks(self, network: Network) -> Iterator[str]:
        """Name what reads the stream and cannot be rotated, because the model's class has no module for it."""
        if network.unbuilt is not None:
            yield f"leaves {network.unbuilt.told} out: the model's class has no module for it, and the stream that it reads is another"

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Rotate in place; raises AerogelError, before anything is changed, when the stream cannot be rotated exactly."""
        stream, find = stream_of(network), network.module.get_submodule
        norms = [_Norm.of(network.module, edge) for edge in stream.norms]
        for name in (*stream.writers, *stream.readers):
            _weight(find(name))
        rotation_CC = ROTATIONS[self.kind](stream.width, torch.Generator().manual_seed(self.seed))
        if stream.keeps_mean:
            rotation_CC = keep_mean(rotation_CC)
        network.unbuilt = None
        _untie(network, stream)
        for name in (*stream.tables, *stream.vectors):
            parameter = network.module.get_parameter(name)
            parameter.copy_(apply_rotation(parameter, rotation_CC))
        for name in stream.writers:
            bias_O = getattr(find(name), "bias", None)
            weight_CI = _weight(find(name)).flatten(1)  # of a convolution too
            weight_CI.copy_(apply_rotation(weight_CI.T, rotation_CC).T)
            if bias_O is not None:
                bias_O.copy_(apply_rotation(bias_O, rotation_CC))
        gains = {name: norm.gain_C for norm in norms for name in norm.readers}
        for name in stream.readers:
            weight_OC, gain_C = _weight(find(name)), gains.get(name)
            # The norm's gain and the rotation in one product, rounded once.
            matrix_CC = rotation_CC if gain_C is None else gain_C[:, None] * rotation_CC.to(gain_C.device)
            weight_OC.copy_(apply_rotation(weight_OC.movedim(1, -1), matrix_CC).movedim(-1, 1))
        for norm in norms:
            norm.unfold(rotation_CC)


def keep_mean(rotation_CC: Tensor) -> Tensor:
    """Return the nearest relative of a rotation that leaves (1, ..., 1) in place: R F with the reflection F that makes R F 1 = 1.

    LayerNorm takes the mean away. Under such a rotation the mean of x R is that of x, so LayerNorm commutes with it exactly and need not
    be replaced by RMSNorm, which would make another architecture.
    """
    one_C = torch.full((len(rotation_CC),), len(rotation_CC) ** -0.5, dtype=rotation_CC.dtype)
    axis_C = one_C - rotation_CC.T @ one_C
    power = axis_C.square().sum()
    if power < 1e-20:
        return rotation_CC
    return rotation_CC - torch.outer(rotation_CC @ axis_C, axis_C) * (2 / power)


def stream_of(network: Network) -> Residual:
    """Return the stream of a model; raises AerogelError with the reason why it has none that a rotation passes."""
    found = network.residual
    if isinstance(found, str):
        raise AerogelError(
            f"cannot rotate: this {network.family.name} model has no residual stream that a rotation passes ({found}); leave this step out"
        )
    return found


class _Norm(NamedTuple):
    """A norm that reads the stream."""

    module: nn.Module
    gain_C: Tensor
    offset: float
    readers: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, edge: Edge) -> _Norm:
        """Read a norm; raises AerogelError for a channel that cannot be expressed without its gain."""
        norm = module.get_submodule(edge.sources[0])
        gain_C = _weight(norm).double() + edge.offset
        if getattr(norm, "bias", None) is not None and bool((gain_C == 0).any()):
            raise AerogelError("cannot rotate: a norm has a channel with weight 0 and a bias, which no rotated norm can express")
        return cls(norm, gain_C, edge.offset, edge.sinks)

    def unfold(self, rotation_CC: Tensor) -> None:
        """Leave no gain in the norm; a bias stays, divided by the gain and rotated."""
        bias_C = getattr(self.module, "bias", None)
        if bias_C is not None:
            bias_C.copy_(apply_rotation(bias_C.double() / self.gain_C, rotation_CC))
        _weight(self.module).fill_(1 - self.offset)


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.device.type == "meta":
        raise AerogelError(f"cannot rotate: a {type(module).__name__} is quantized or not in memory; rotate first, with all weights loaded")
    return weight


def _untie(network: Network, stream: Residual) -> None:
    """Give layers that share their weight with an embedding one of their own: what they read is not what the embedding gives."""
    tables = {id(network.module.get_parameter(name)): name for name in stream.tables}
    for name, layer in list(network.module.named_modules()):
        for key, weight in layer.named_parameters(recurse=False):
            if tables.get(id(weight), full := f"{name}.{key}") != full:
                setattr(layer, key, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
                network.config.tie_word_embeddings = False
