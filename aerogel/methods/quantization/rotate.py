"""Rotate: spread outliers over all channels with an orthogonal matrix folded through the residual stream.

Every block reads the stream through a norm and adds to it through a linear, so a rotation of the stream cancels inside the network:
weights change, the function does not (SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456). Weights and inputs that are easier to
quantize are what is left.

Legend: O outputs, I inputs, C channels of the stream, R = rotation_CC. Stream vectors are rows: x becomes x R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Residual
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from aerogel.numerics.rotation import ROTATIONS, apply_rotation


@dataclass(frozen=True)
class Rotate(Method):
    """Rotates the residual stream without changing the function, so that weights quantize better (arXiv:2404.00456)."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"residual", "uncached", "dense"})

    kind: Literal["hadamard", "random"] = "hadamard"
    """Rotation: a Hadamard matrix with random signs spreads most evenly; a random orthogonal one exists for every width."""
    seed: int = 0
    """Seed of the random signs or of the random matrix."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for the stream, and for a part of it that is quantized by then."""
        found = list(reasons(lambda: _stream(network)))
        if quantized := [] if found else sorted({*before.quantized} & _names(network, _stream(network))):
            found = [f"cannot rotate: {quantized[0]} is quantized by then; put rotate first"]
        yield from found

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Rotate in place; raises AerogelError, before anything is changed, when the stream cannot be rotated exactly."""
        stream = _stream(network)
        offset = next((edge.offset for block in blocks_of(network) for edge in block.edges() if edge.offset), 0.0)
        width = _width(stream, offset)
        rotation_CC = ROTATIONS[self.kind](width, torch.Generator().manual_seed(self.seed))
        if any(isinstance(norm, nn.LayerNorm) for norm, _ in stream.norms):
            rotation_CC = keep_mean(rotation_CC)
        _untie(network, stream)
        for embedding in stream.embeddings:
            _weight(embedding).copy_(apply_rotation(_weight(embedding), rotation_CC))
        for writer in stream.writers:
            writer.weight.copy_(apply_rotation(writer.weight.T, rotation_CC).T)
            if writer.bias is not None:
                writer.bias.copy_(apply_rotation(writer.bias, rotation_CC))
        for norm, readers in stream.norms:
            _fold(norm, readers, rotation_CC, offset)


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


class _Stream(NamedTuple):
    """Everything that touches the residual stream."""

    embeddings: list[nn.Module]
    writers: list[nn.Linear]
    norms: list[tuple[nn.Module, list[nn.Module]]]
    """Each norm that reads the stream, with the modules that read the norm."""
    head: nn.Module


def _stream(network: Network) -> _Stream:
    """Find the parts that the family names; raises AerogelError when the family or a block names too few."""
    residual, family = network.family.residual, network.family.name
    if residual is None or not residual.holds(network.config):
        raise AerogelError(f"cannot rotate: family {family!r} names no residual stream that a rotation passes exactly; leave this step out")
    writers: list[nn.Linear] = []
    norms: list[tuple[nn.Module, list[nn.Module]]] = []
    for name, module in network.blocks().items():
        block = Block(name, module, 0, 1, (), network)
        writing = _writers(block, residual)
        reading = _norms(block, set(writing), residual.inner)
        if not writing or not reading:
            raise AerogelError(
                f"cannot rotate: {name} has no {'norm' if writing else 'linear'} by which family {family!r} knows its stream"
            )
        writers += writing.values()
        norms += reading
    find = network.module.get_submodule
    norms.append((find(residual.final_norm), [find(residual.head)]))
    return _Stream([find(name) for name in residual.embeddings], writers, norms, find(residual.head))


def _names(network: Network, stream: _Stream) -> set[str]:
    """The full names of the modules that a rotation changes."""
    parts = [*stream.embeddings, *stream.writers, *(reader for _, readers in stream.norms for reader in readers), stream.head]
    own = set(map(id, parts))
    return {name for name, module in network.module.named_modules() if id(module) in own}


def _writers(block: Block, residual: Residual) -> dict[str, nn.Linear]:
    linears = {name: module for name, module in block.module.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if any(fnmatchcase(name, pattern) for pattern in residual.writers)}


def _norms(block: Block, writers: set[str], inner: tuple[str, ...]) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The block's norms on the stream and their readers; a norm that a writer reads lies inside the block."""
    find = block.module.get_submodule
    edges = [edge for edge in block.edges() if not writers & set(edge.sinks) and not set(inner) & set(edge.sources)]
    edges = [edge for edge in edges if not any(isinstance(find(name), nn.Linear) for name in edge.sources)]
    return [(find(edge.sources[0]), [find(name) for name in edge.sinks]) for edge in edges]


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.device.type == "meta":
        raise AerogelError(f"cannot rotate: a {type(module).__name__} is quantized or not in memory; rotate first, with all weights loaded")
    return weight


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _width(stream: _Stream, offset: float) -> int:
    """Return the stream's width; raises AerogelError when a tensor cannot be rotated: absent, quantized or of another width."""
    width = _weight(stream.embeddings[0]).shape[-1]
    readers = [reader for _, readers in stream.norms for reader in readers]
    widths = {_weight(module).shape[-1] for module in (*stream.embeddings, *readers)} | {
        _weight(writer).shape[0] for writer in stream.writers
    }
    if widths != {width}:
        raise AerogelError(f"cannot rotate: the stream is {width} wide, but parts of it are {sorted(widths - {width})} wide")
    for norm, _ in stream.norms:
        if _bias(norm) is not None and bool((_weight(norm) + offset == 0).any()):
            raise AerogelError("cannot rotate: a norm has a channel with weight 0 and a bias, which no rotated norm can express")
    return width


def _untie(network: Network, stream: _Stream) -> None:
    """Give the head its own weight: it takes in the final norm, the embedding does not."""
    weight = _weight(stream.head)
    if any(weight is _weight(embedding) for embedding in stream.embeddings):
        stream.head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        network.config.tie_word_embeddings = False


def _fold(norm: nn.Module, readers: list[nn.Module], rotation_CC: Tensor, offset: float) -> None:
    """Move the norm's gain into its readers and rotate what they read; a bias stays in the norm, divided by the gain and rotated."""
    gain_C, bias_C = _weight(norm).double() + offset, _bias(norm)
    for reader in readers:
        weight_OC = _weight(reader)
        weight_OC.copy_(apply_rotation(weight_OC, gain_C[:, None] * rotation_CC.to(gain_C.device)))
    if bias_C is not None:
        bias_C.copy_(apply_rotation(bias_C.double() / gain_C, rotation_CC))
    _weight(norm).fill_(1 - offset)
