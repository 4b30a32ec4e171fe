"""The probe: scales a source of a block and looks which later products read the scale, whole and as it is.

Legend: R rows (outputs) of a source, I input columns of a sink, s_R a scale for each row.

Every product is answered from a recording of the block: one whose input did not change gives what it gave, one whose input is the recorded
one times scales is a sink and gives what it gave, and any other change refuses the source. So routing stays fixed, one run finds and tests
all sinks, and no product is computed again, however large the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import map_tensors, tensors_in
from aerogel.model.structure.observer import Observer, Read, double_by_default

_EQUAL, _RATIO = 1e-13, 1e-9
_LOUD = (1.0, 30.0, 1000.0)
"""Sizes of the scales: a clamp does not show on small values."""


class Refused(Exception):  # noqa: N818  it ends a trial, it is no error
    """A source whose channels cannot be scaled, with the reason."""


@dataclass(frozen=True)
class Recorded:
    """A product of the recorded run."""

    read: Read
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Sink:
    """A parameter that reads a source: for each of its input columns the row of the source, -1 for a column that it does not feed."""

    rows_I: Tensor
    power: int
    """1 where inputs are scaled as the source is, 2 where a square stands between."""


class Probe:
    """A part of a network in float64 with inputs, what it gave for them, and every product on the way."""

    def __init__(
        self, run: Callable[[], Any], parameters: Mapping[str, nn.Parameter], answer: Callable[[Read], Tensor] | None = None
    ) -> None:
        """Run and record; with `answer` products are not computed, it gives their results."""
        self._forward, self.parameters = run, parameters
        self.reads: dict[tuple[str, tuple[int, ...], int], Recorded] = {}
        self._generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            self.base = _floats(map_tensors(lambda tensor: tensor.clone(), self.run(after=self._record, answer=answer)))

    def _record(self, read: Read, y: Tensor) -> None:
        self.reads[read.key] = Recorded(read, read.x.detach().clone(), y.detach().clone())

    def run(self, **hooks: Any) -> Any:
        """One forward under an observer with these hooks."""
        with double_by_default(), Observer(self.parameters, **hooks):
            return self._forward()

    def of(self, name: str) -> list[Recorded]:
        """The recorded products with a parameter."""
        return [recorded for recorded in self.reads.values() if recorded.read.name == name]

    def gives(self, output: Any) -> bool:
        """Return True for an output that is that of the recorded run but for rounding."""
        return _alike(_floats(output), self.base)

    def scales(self, size: int) -> Tensor:
        """Random scales, all different."""
        return 0.5 + 1.5 * torch.rand(size, generator=self._generator, dtype=torch.float64)

    def sinks(
        self,
        rows_R: Tensor,
        *,
        of: tuple[str, ...] = (),
        changed: Callable[[Tensor], dict[nn.Parameter, Tensor]] | None = None,
        scaled: Callable[[Tensor, int, Tensor], Tensor] | None = None,
    ) -> dict[str, Sink]:
        """Return what reads these rows, of products with the parameters `of` or of a source that `changed(s_R)` scales by itself.

        Of products what they give is multiplied by s_R, or is `scaled(y, dim, s_R)`, where outputs lie in that dimension.
        Scales are drawn for three sizes of the source; all must find the same. Raises Refused with the reason.
        """
        found: dict[str, Sink] | None = None
        for loud in _LOUD:
            s_R = torch.where(rows_R, loud * self.scales(len(rows_R)), 1.0)
            trial = _Trial(self, s_R, frozenset(of), scaled or _multiplied)
            with torch.no_grad(), holding(changed(s_R) if changed is not None else {}):
                output = _floats(self.run(answer=trial.answer))
            now = trial.finished(output)
            if found is not None and {name: sink.power for name, sink in now.items()} != {name: sink.power for name, sink in found.items()}:
                raise Refused("other layers read it when it is large")
            found = now
        assert found is not None
        return found


class _Trial:
    """One run with a scaled source."""

    def __init__(self, probe: Probe, s_R: Tensor, of: frozenset[str], scaled: Callable[[Tensor, int, Tensor], Tensor]) -> None:
        self._probe, self._s_R, self._of, self._scaled = probe, s_R, of, scaled
        self._sinks: dict[str, Sink] = {}
        self._hit: set[tuple[str, tuple[int, ...], int]] = set()

    def answer(self, read: Read) -> Tensor:
        """The recorded result, scaled if it is the source's; raises Refused for an input that changed otherwise than by scales."""
        recorded = self._probe.reads.get(read.key)
        if recorded is None or recorded.x.shape != read.x.shape:
            raise Refused("tokens take another way")
        sink = self._compared(read, recorded)
        if sink is not None:
            self._hit.add(read.key)
            known = self._sinks.get(read.name)
            self._sinks[read.name] = sink if known is None else _agreeing(known, sink)
        if read.name not in self._of:
            return recorded.y.clone()  # the model's code may add to it in place
        first = read.start[read.out_dim] if read.out_dim is not None else 0
        return self._scaled(recorded.y, read.y_dim, self._s_R[first : first + read.outputs])

    def finished(self, output: list[Tensor]) -> dict[str, Sink]:
        """Return the sinks; raises Refused where something else reads the source, or a sink reads something else too."""
        if not _alike(output, self._probe.base):
            raise Refused("the block's output reads it")
        if not self._sinks:
            raise Refused("no layer reads it")
        for key, recorded in self._probe.reads.items():
            if key[0] in self._sinks and key not in self._hit and bool((recorded.x != 0).any()):
                raise Refused(f"{key[0]} reads something else too")
        return {name: Sink(completed(sink.rows_I), sink.power) for name, sink in self._sinks.items()}

    def _compared(self, read: Read, recorded: Recorded) -> Sink | None:
        """Return how an input changed; None where it did not."""
        if torch.equal(read.x, recorded.x):
            return None
        x = read.x.movedim(read.x_dim, -1).flatten(0, -2)
        base = recorded.x.movedim(read.x_dim, -1).flatten(0, -2)
        if not x.is_floating_point() or (x - base).abs().max() <= _EQUAL * base.abs().max():
            return None
        top_I, energy_I = base.abs().amax(0), base.square().sum(0)
        ratio_I = torch.where(energy_I > 0, (x * base).sum(0) / energy_I.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        if ((x - ratio_I * base).abs().amax(0) > _RATIO * torch.maximum(top_I, top_I * ratio_I.abs())).any() or (
            x[:, top_I == 0] != 0
        ).any():
            raise Refused(f"{read.name} does not read it channel by channel")
        unscaled_I = (ratio_I - 1).abs() <= 1e-10
        for power in (1, 2):
            rows_I = _nearest(self._s_R**power, ratio_I)
            hit_I = (self._s_R[rows_I] ** power - ratio_I).abs() <= _RATIO * ratio_I.abs()
            if bool((hit_I | unscaled_I).all()):
                rows_I = torch.where(hit_I & ~unscaled_I, rows_I, -1)
                return Sink(rows_I.masked_fill(top_I == 0, UNSEEN), power)
        raise Refused(f"{read.name} reads it scaled by something else")


def _multiplied(y: Tensor, dim: int, s_R: Tensor) -> Tensor:
    shape = [1] * y.ndim
    shape[dim] = len(s_R)
    return y * s_R.view(shape)


UNSEEN = -2
"""Row of a column that was zero for every token."""


@contextmanager
def holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Put other data in parameters for a while."""
    before = [(parameter, parameter.data) for parameter in values]
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in reversed(before):
            parameter.data = data


def completed(rows_I: Tensor) -> Tensor:
    """Fill columns that were zero for every token, behind a ReLU for example, by the rule of the others; raises Refused without one."""
    if not (rows_I == UNSEEN).any():
        return rows_I
    known_I = rows_I >= 0
    if not known_I.any() or (rows_I == -1).any():
        raise Refused("some columns were zero for every token")
    count, columns = len(rows_I), torch.arange(len(rows_I))
    for repeats in (repeats for repeats in range(1, 17) if count % repeats == 0):
        width = count // repeats
        for head in [width] if repeats == 1 else [head for head in range(1, width + 1) if width % head == 0]:
            rule_I = columns // (repeats * head) * head + columns % head
            shift = (rows_I - rule_I)[known_I]
            if bool((shift == shift[0]).all()):
                return rule_I + shift[0]
    raise Refused("some columns were zero for every token")


def _agreeing(one: Sink, other: Sink) -> Sink:
    """Return what two products with a parameter say of its columns together; raises Refused where they differ."""
    if one.rows_I.shape != other.rows_I.shape or one.power != other.power:
        raise Refused("a layer reads it in two ways")
    both_I = (one.rows_I != UNSEEN) & (other.rows_I != UNSEEN)
    if not torch.equal(one.rows_I[both_I], other.rows_I[both_I]):
        raise Refused("a layer reads it in two ways")
    return Sink(torch.maximum(one.rows_I, other.rows_I), one.power)


def _nearest(values: Tensor, wanted: Tensor) -> Tensor:
    """Index of the value that is nearest to each one wanted."""
    ordered, index = values.sort()
    after = torch.searchsorted(ordered, wanted).clamp(1, max(len(values) - 1, 1))
    if len(values) == 1:
        return torch.zeros_like(wanted, dtype=torch.long)
    before = after - 1
    return index[torch.where((ordered[before] - wanted).abs() < (ordered[after] - wanted).abs(), before, after)]


def _floats(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(tree) if tensor.is_floating_point()]


def _alike(output: list[Tensor], base: list[Tensor]) -> bool:
    """Return True where two outputs are equal but for rounding; infinities, as in masks, stand in the same places."""
    if [tensor.shape for tensor in output] != [tensor.shape for tensor in base]:
        return False
    return all(
        bool(torch.allclose(mine, theirs, rtol=0, atol=_RATIO * _size(theirs), equal_nan=True))
        for mine, theirs in zip(output, base, strict=True)
    )


def _size(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
