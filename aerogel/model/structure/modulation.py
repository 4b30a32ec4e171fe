"""Modulation of adaLN: rows of a layer that multiply what a norm gives, and rows that are added to it.

Legend: R rows of the layer, I input columns of the product that reads what was modulated, T tokens, J columns that are looked at.

A modulated column is z_i = n_i (o + y_a) + y_b with rows a and b of the layer: dz_i/dy_b = 1, and (o + y_a) dz_i/dy_a = z_i - y_b. Rows of
one kind stand together, in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerogel.model.edges import Edge
from aerogel.model.structure.observer import Read
from aerogel.model.structure.probe import Probe, Refused

_SAMPLE = 8
_OFFSETS = (1.0, 0.0)
_EXACT = 1e-9


@dataclass(frozen=True)
class Modulation:
    """Rows of a layer that modulate the input of another."""

    rows_I: Tensor
    """For each column the row that multiplies."""
    added_I: Tensor
    """For each column the row that is added."""
    offset: float
    """Number added to the rows that multiply: 1 in adaLN."""

    def scaled(self, y: Tensor, dim: int, s_R: Tensor) -> Tensor:
        """Return the layer's output that makes the modulated channels s_R times as large; s_R is read at the rows that multiply."""
        y = y.movedim(dim, -1).clone()
        s_I = s_R[self.rows_I]
        y[..., self.rows_I] = (y[..., self.rows_I] + self.offset) * s_I - self.offset
        y[..., self.added_I] *= s_I
        return y.movedim(-1, dim)

    def completed(self, edge: Edge) -> Edge:
        """The edge that was found by scaling the rows that multiply, with those that are added."""
        if not torch.equal(edge.rows_I, self.rows_I):
            raise Refused("it modulates some columns and not others")
        return replace(edge, offset=self.offset, added_I=self.added_I)


@torch.enable_grad()
def modulations_in(probe: Probe, name: str) -> Iterator[Modulation]:
    """Find what the rows of a layer that is read once a sample modulate."""
    (recorded, *more) = probe.of(name)
    rows = recorded.read.outputs
    most = max(_tokens(other.x, other.read.x_dim) for other in probe.reads.values())
    if more or rows != len(probe.parameters[name]) or _tokens(recorded.y, recorded.read.y_dim) == most:
        return
    y = recorded.y.movedim(recorded.read.y_dim, -1).clone().requires_grad_()
    readers = [z_TI for z_TI in _readers(probe, name, y) if rows % z_TI.shape[1] == 0 and len(z_TI) > y.numel() // rows]
    for columns, places in dict.fromkeys((z_TI.shape[1], _places(y, z_TI)) for z_TI in readers):
        if places is not None:
            multiplies, added, offset = places
            index_I = torch.arange(columns)
            yield Modulation(index_I + multiplies * columns, index_I + added * columns, offset)


def _tokens(tensor: Tensor, dim: int) -> int:
    return tensor.numel() // max(tensor.shape[dim], 1)


def _readers(probe: Probe, name: str, y: Tensor) -> list[Tensor]:
    """Inputs of the products that are made from what the layer gives, tokens first, with a graph back to it."""
    found: list[Tensor] = []

    def answer(read: Read) -> Tensor:
        recorded = probe.reads[read.key]
        if read.name == name:
            return y.movedim(-1, read.y_dim) * 1
        if read.x.requires_grad:
            found.append(read.x.movedim(read.x_dim, -1).flatten(0, -2))
        return recorded.y.clone()

    probe.run(answer=answer)
    return found


def _places(y: Tensor, z_TI: Tensor) -> tuple[int, int, float] | None:
    """Return the numbers of the chunks, as wide as the input, that multiply and are added, with the offset; None without such a pair."""
    columns = z_TI.shape[1]
    drawn_J = torch.randperm(columns, generator=torch.Generator().manual_seed(3))[:_SAMPLE]
    z_J = z_TI[-1, drawn_J]
    slope_JSR = torch.stack([torch.autograd.grad(z, y, retain_graph=True)[0].flatten(0, -2) for z in z_J])
    sample = int(slope_JSR.abs().amax((0, 2)).argmax())
    parts = y.shape[-1] // columns
    slope_JP, y_JP = (tensor.unflatten(-1, (parts, columns)) for tensor in (slope_JSR[:, sample], y.detach().flatten(0, -2)[sample]))
    slope_JP = slope_JP[torch.arange(len(drawn_J)), :, drawn_J]
    y_JP = y_JP[:, drawn_J].T
    for added in range(parts):
        if bool(((slope_JP[:, added] - 1).abs() > _EXACT).any()):
            continue
        rest_J = z_J.detach() - y_JP[:, added]
        for multiplies in (part for part in range(parts) if part != added):
            for offset in _OFFSETS:
                error_J = (y_JP[:, multiplies] + offset) * slope_JP[:, multiplies] - rest_J
                if bool((error_J.abs() <= _EXACT * rest_J.abs().max()).all()) and bool(rest_J.abs().max() > 0):
                    return multiplies, added, offset
    return None
