"""Statistics of the inputs of linear layers, reduced while the calls of a block pass: Hessians, mean squares, ranges, rows as a sample.

T tokens (rows of an input, whatever its other dimensions), I input columns. Linear layers that are given the very same tensor share
one set of statistics. Nothing is kept but the sums, so memory does not grow with the number of calls. The Hessian and the mean squares of a
convolution are those of its patches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, capture_inputs, until
from aerogel.model.processes import Processes

_PANEL = 256
"""Columns of a Hessian that are computed at once; its lower half is never computed."""


class InputStatistics:
    """Sums over every input that one or more linear layers were given."""

    def __init__(
        self,
        columns: int,
        device: torch.device,
        moment: bool = False,
        ranges: bool = False,
        rows_per_call: int = 0,
        name: str = "a layer",
        squares: bool = False,
    ) -> None:
        """`name` is that of a layer, for errors."""
        self.name = name
        self.tokens = 0
        self.columns = columns
        self._sum_II = torch.zeros(columns, columns, device=device) if moment else None
        self._squares_I = torch.zeros(columns, device=device) if squares else None
        self._absolute_I = torch.zeros(columns, device=device) if ranges else None
        self._absmax_I = torch.zeros(columns, device=device) if ranges else None
        self.extremes: list[tuple[float, float]] = []
        """Smallest and largest input of each call."""
        self._rows_per_call = rows_per_call
        self._rows: list[Tensor] = []
        self._complete = False

    def update(self, x: Tensor) -> None:
        """Take in one input (..., I); raises AerogelError where its range is not finite."""
        assert not self._complete, "the Hessian was made already"
        x_TI = x.detach().reshape(-1, x.shape[-1])
        if not len(x_TI):
            return
        self.tokens += len(x_TI)
        if self._rows_per_call:
            picked = torch.linspace(0, len(x_TI) - 1, min(self._rows_per_call, len(x_TI)), device=x.device).round().long()
            self._rows.append(x_TI[picked])
        if self._sum_II is not None:
            _add_gram(self._sum_II, x_TI)
        if self._squares_I is not None:
            self._squares_I += x_TI.float().square().sum(0)
        if self._absolute_I is not None and self._absmax_I is not None:
            x_TI = x_TI.to(torch.float32)
            magnitude_TI = x_TI.abs()
            self._absolute_I += magnitude_TI.sum(0)
            torch.maximum(self._absmax_I, magnitude_TI.amax(0), out=self._absmax_I)
            low, high = (extreme.item() for extreme in torch.aminmax(x_TI))
            if not math.isfinite(high - low):
                raise self._not_finite(max(-low, high))
            self.extremes.append((low, high))

    def merge(self, other: InputStatistics) -> None:
        """Take in what another set has seen."""
        assert not any(part._complete for part in (self, other)), "the Hessian was made already"
        self.tokens += other.tokens
        pairs = ((self._sum_II, other._sum_II), (self._squares_I, other._squares_I), (self._absolute_I, other._absolute_I))
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine += theirs
        if self._absmax_I is not None and other._absmax_I is not None:
            torch.maximum(self._absmax_I, other._absmax_I, out=self._absmax_I)
        self.extremes += other.extremes
        self._rows += other._rows

    def add_others(self, processes: Processes, device: torch.device) -> None:
        """Take in what all processes have seen of the same inputs; sampled rows are in the order of calls."""
        for total in (self._sum_II, self._squares_I, self._absolute_I):
            if total is not None:
                processes.add_up(total)
        if self._absmax_I is not None:
            processes.take_largest(self._absmax_I)
        if self._rows_per_call:
            self._rows = [rows for part in processes.gather_nested(self._rows, device) for rows in part]

    def moment(self) -> Tensor:
        """Mean of x x^T over all tokens: moment_II in float32, not to be changed; raises AerogelError when it is not finite.

        Made in the place of the sum, as the largest tensor of a run; no input is taken in afterwards.
        """
        assert self._sum_II is not None, "statistics were collected without the Hessian"
        if not self._complete:
            self._sum_II.div_(max(self.tokens, 1))
            if not math.isfinite(trace := self._sum_II.diagonal().sum().item()):
                raise self._not_finite(trace)
            _mirror(self._sum_II)
            self._complete = True
        return self._sum_II

    def mean_square(self) -> Tensor:
        """Mean of x^2 over all tokens, for each column, in float32: the Hessian's diagonal; raises AerogelError when it is not finite."""
        assert self._squares_I is not None, "statistics were collected without squares"
        if not math.isfinite(total := self._squares_I.sum().item()):
            raise self._not_finite(total)
        return self._squares_I / max(self.tokens, 1)

    def _not_finite(self, largest: float) -> AerogelError:
        return AerogelError(
            f"{self.name}: its inputs are not finite (largest magnitude {largest}); check the weights and the calibration data"
        )

    def mean_magnitude(self) -> Tensor:
        """Mean of |x| over all tokens, for each column."""
        assert self._absolute_I is not None, "statistics were collected without ranges"
        return self._absolute_I / max(self.tokens, 1)

    def absmax(self) -> Tensor:
        """Largest |x| over all tokens, for each column."""
        assert self._absmax_I is not None, "statistics were collected without ranges"
        return self._absmax_I

    def sample(self) -> Tensor:
        """The kept rows: some of every call, evenly spaced, x_TI in the inputs' dtype."""
        return torch.cat(self._rows)


def _add_gram(sum_II: Tensor, x_TI: Tensor) -> None:
    """Add x^T x to the upper half of a sum in float32; on a CPU the products below the diagonal's panels are not computed."""
    columns = len(sum_II)
    panel = _PANEL if sum_II.device.type == "cpu" else columns
    with bfloat16_products() if x_TI.dtype == torch.bfloat16 else nullcontext():
        x_TI = x_TI.to(torch.float32)
        for start in range(0, columns, panel):
            sum_II[start : start + panel, start:].addmm_(x_TI[:, start : start + panel].T, x_TI[:, start:])


def _mirror(sum_II: Tensor) -> None:
    """Copy the upper half to the lower one, by panels: up to 13 times as fast as the sum with the transposed, and no second matrix."""
    for start in range(0, len(sum_II), _PANEL):
        stop = start + _PANEL
        corner = sum_II[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        sum_II[stop:, start:stop] = sum_II[start:stop, stop:].T


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 products on a CPU round their factors to bfloat16: exact where they were bfloat16 before, and twice as fast."""
    backend: Any = torch.backends.mkldnn  # torch makes its parts at run time
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def collect(
    block: Block, names: Iterable[str], *, moment: bool = False, ranges: bool = False, squares: bool = False, rows: int = 0
) -> dict[str, InputStatistics]:
    """Run the block's calls once and return the statistics of these linear layers, in the order in which they ran.

    Linear layers that were always given the same tensor get the same object. A linear that no call reached is left out. Every forward
    stops at the last input that is needed. `rows` is how many rows a sample of one input should have, over all calls.
    Raises AerogelError when an input is not finite.
    """
    linears = {name: block.module.get_submodule(name) for name in names}
    rows_per_call = -(-rows // max(sum(block.processes.gather(len(block.calls))), 1))
    parts: dict[tuple[str, ...], InputStatistics] = {}

    def take(names: tuple[str, ...], x: Tensor) -> None:
        for alike, rows in _as_rows(linears, names, x) if moment or squares else [(names, x)]:
            if alike not in parts:
                name = block.full_name(alike[0])
                parts[alike] = InputStatistics(rows.shape[-1], rows.device, moment, ranges, rows_per_call, name, squares)
            parts[alike].update(rows)

    visits: Counter[str] = Counter()
    with cache_dequantized(block.module):
        for call in block.calls:
            seen = _Seen(take, visits)
            with until(seen.stop), capture_inputs(linears, seen.see):
                block.run(call)
            seen.flush()
            visits |= seen.count | Counter(list(linears))
    return _total(together(block, parts, moment=moment, ranges=ranges, squares=squares, rows_per_call=rows_per_call))


def _as_rows(layers: Mapping[str, nn.Module], names: tuple[str, ...], x: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
    """An input as the layers multiply it: convolutions of each geometry read its patches, linear layers the input itself."""
    alike: dict[object, list[str]] = {}
    for name in names:
        layer = layers[name]
        window = None
        if isinstance(layer, nn.Conv2d):
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
        alike.setdefault(window, []).append(name)
    return [(tuple(group), _patches(layers[group[0]], x)) for group in alike.values()]


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies by its kernel, (N, T, C x height x width); the input itself for other layers."""
    if not isinstance(layer, nn.Conv2d):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(x if x.ndim == 4 else x[None], layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = ((int(pair[0]), int(pair[1])) for pair in (layer.kernel_size, layer.dilation, layer.stride))
    return unfold(padded, kernel, dilation=dilation, stride=stride).transpose(1, 2)


def together(
    block: Block,
    parts: Mapping[tuple[str, ...], InputStatistics],
    *,
    moment: bool = False,
    ranges: bool = False,
    squares: bool = False,
    rows_per_call: int = 0,
) -> dict[tuple[str, ...], InputStatistics]:
    """Add up, over the processes that share the block's calls, what each has seen of the inputs of these linear layers."""
    if block.processes.alone:
        return dict(parts)
    seen = block.processes.gather({names: (part.columns, part.tokens, part.extremes) for names, part in parts.items()})
    totals: dict[tuple[str, ...], InputStatistics] = {}
    for names, (columns, _, _) in {names: facts for one in seen for names, facts in one.items()}.items():
        device = block.network.device
        total = totals[names] = parts.get(names) or InputStatistics(
            columns, device, moment, ranges, rows_per_call, block.full_name(names[0]), squares
        )
        total.add_others(block.processes, device)
        total.tokens = sum(one[names][1] for one in seen if names in one)
        total.extremes = [pair for one in seen if names in one for pair in one[names][2]]
    return totals


def sharing(block: Block, names: Iterable[str]) -> list[tuple[str, ...]]:
    """The linear layers that get the same tensor, in the order in which they run; those that run twice in a forward, twice.

    Nothing where calls differ in that.
    """
    linears = {name: block.module.get_submodule(name) for name in names}
    if block.one_row_each is not None:
        routes = _routes(block, linears, block.one_row_each)
        if all({*linears} <= {name for group in route for name in group} for route in routes):
            return _one_route(routes)
    return _one_route(_routes(block, linears, block.calls))  # experts that one sample does not reach


def _routes(block: Block, linears: dict[str, nn.Module], calls: Iterable[Call]) -> list[list[tuple[str, ...]]]:
    """The groups of layers that get the same tensor, in order, for every shape of call."""
    routes: dict[str, list[tuple[str, ...]]] = {}
    for call in calls:
        if call.shape not in routes:
            run: list[tuple[str, ...]] = []
            seen = _Seen(lambda names, _, route=run: route.append(names), Counter())  # type: ignore[misc]
            with capture_inputs(linears, seen.see):
                block.run(call)
            seen.flush()
            routes[call.shape] = run
    return list({shape: route for part in block.processes.gather(routes) for shape, route in part.items()}.values())


def _one_route(routes: list[list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    return routes[0] if routes and all(route == routes[0] for route in routes) else []


class _Seen:
    """One call's inputs: hands each tensor on once, with the names of all linear layers that were given it in a row."""

    def __init__(self, take: Callable[[tuple[str, ...], Tensor], None], visits: Counter[str]) -> None:
        self._take = take
        self._visits = visits
        self._missing = visits.total()
        self._names: list[str] = []
        self._x: Tensor | None = None
        self.count: Counter[str] = Counter()
        self.stop = Stop()

    def see(self, name: str, x: Tensor) -> None:
        if x is not self._x:
            self.flush()
            self._x = x
        self._names.append(name)
        self.count[name] += 1
        self._missing -= self.count[name] <= self._visits[name]
        # The first call runs to its end, since nobody knows yet how often it visits each linear.
        if self._visits and not self._missing:
            raise self.stop

    def flush(self) -> None:
        if self._x is not None:
            self._take(tuple(self._names), self._x)
        self._names, self._x = [], None


def _total(parts: dict[tuple[str, ...], InputStatistics]) -> dict[str, InputStatistics]:
    """The statistics of each linear; names that met in some calls only are summed up apart."""
    met: dict[str, list[tuple[str, ...]]] = {}
    for names in parts:
        for name in dict.fromkeys(names):
            met.setdefault(name, []).append(names)
    totals: dict[tuple[tuple[str, ...], ...], InputStatistics] = {}
    for keys in dict.fromkeys(map(tuple, met.values())):
        total = parts[keys[0]] if len(keys) == 1 else deepcopy(parts[keys[0]])
        for key in keys[1:]:
            total.merge(parts[key])
        totals[keys] = total
    return {name: totals[tuple(keys)] for name, keys in met.items()}
