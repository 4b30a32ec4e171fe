"""Rows of a fused layer, such as value in qkv or up in gate_up, that a later product reads as they are.

Legend: R rows of the source, I input columns of the product that reads it, T tokens.

A column that is linear in one row y_r and in no other way depends on it obeys dz/dy_r . y_r = z (Euler's theorem).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aerogel.model.hooks import Stop, until
from aerogel.model.structure.observer import Read
from aerogel.model.structure.probe import Probe, Refused

_SAMPLE = 16
_REPEATS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
_TRIED = 12


@torch.enable_grad()
def rows_read_linearly(probe: Probe, name: str) -> Tensor | None:
    """Return rows_R, True for the rows of a source that its first reader reads as they are; None where there are none."""
    found = _first_reader(probe, name)
    if found is None:
        return None
    y_TR, z_TI = found
    columns, rows = z_TI.shape[1], y_TR.shape[-1]
    drawn = torch.randperm(columns, generator=torch.Generator().manual_seed(3))[:_SAMPLE]
    hits = _hits(found, drawn)
    if not hits:
        return None
    if len(hits) == len(drawn):
        for rows_R in _layouts(rows, columns, hits):
            try:
                sinks = probe.sinks(rows_R, of=(name,))
            except Refused:
                continue
            if all(bool((sink.rows_I >= 0).all()) for sink in sinks.values()):
                return rows_R
    rows_R = torch.zeros(rows, dtype=torch.bool)
    rows_R[list(_hits(found, torch.arange(columns)).values())] = True
    return rows_R


def _first_reader(probe: Probe, name: str) -> tuple[Tensor, Tensor] | None:
    """The output of a source, as a leaf of a graph, and the input of the first product that is made from it, tokens first."""
    stop, held, reader = Stop(), list[Tensor](), list[Tensor]()

    def answer(read: Read) -> Tensor:
        if held and read.x.requires_grad and read.name != name:
            reader.append(read.x.movedim(read.x_dim, -1).flatten(0, -2))
            raise stop
        recorded = probe.reads[read.key]
        if read.name != name or held:
            return recorded.y.clone()
        held.append(recorded.y.movedim(read.y_dim, -1).clone().requires_grad_())
        return held[0].movedim(-1, read.y_dim) * 1

    with until(stop):
        probe.run(answer=answer)
    return (held[0], reader[0]) if reader else None


def _hits(found: tuple[Tensor, Tensor], columns_J: Tensor) -> dict[int, int]:
    """Column -> row for the columns that are linear in one row alone, at both of the last two tokens."""
    _, z_TI = found
    tokens = [len(z_TI) - 1, max(len(z_TI) - 2, 0)]
    hits: dict[int, int] = {}
    for some_J in columns_J.split(64):
        linear_JR = _linear_in(found, tokens[0], some_J) & _linear_in(found, tokens[1], some_J)
        alone_J = linear_JR.sum(1) == 1
        hits |= dict(zip(some_J[alone_J].tolist(), linear_JR[alone_J].int().argmax(1).tolist(), strict=True))
    return hits


def _linear_in(found: tuple[Tensor, Tensor], token: int, columns_J: Tensor) -> Tensor:
    """True where dz_j/dy_r . y_r, summed over tokens, is z_j."""
    y, z_TI = found
    z_J = z_TI[token, columns_J]
    slope = torch.stack([torch.autograd.grad(z, y, retain_graph=True)[0] for z in z_J])
    power_JR = (slope * y.detach()).flatten(1, -2).sum(1)
    value_J1 = z_J.detach()[:, None]
    return ((power_JR - value_J1).abs() < 1e-9 * value_J1.abs()) & (value_J1.abs() > 1e-12)


def _layouts(rows: int, columns: int, hits: dict[int, int]) -> Iterator[Tensor]:
    """Row sets {r: a <= r mod p < a + w} that hold the rows found: the last third, every second, so many of each head."""
    index_R, seen = torch.arange(rows), set[bytes]()
    periods = [period for period in range(2, rows + 1) if rows % period == 0]
    for period in sorted(periods, key=lambda period: (period != rows, period != 2, -period)):
        for repeats in _REPEATS:
            width, rest = divmod(columns // repeats * period, rows)
            if columns % repeats or rest or not 0 < width < period:
                continue
            for first in dict.fromkeys((period - width, *range(0, period - width + 1, width))):
                rows_R = (index_R % period >= first) & (index_R % period < first + width)
                key = rows_R.numpy().tobytes()
                if key not in seen and all(bool(rows_R[row]) for row in hits.values()):
                    seen.add(key)
                    yield rows_R
                if len(seen) >= _TRIED:
                    return
