"""Cache-based maintenance: the temporal path is not run at all, its features are looked up in a table (arXiv:2407.19547).

T steps, C width of a feature. The paper's abstract names the idea; the layout of the table, its dtypes and the choice of contents are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.method import RuntimePolicy
from aerogel.model.calls import Call
from aerogel.model.clock import Clock, steps_of
from aerogel.model.hooks import answering
from aerogel.model.modules import QuantLinear
from aerogel.model.network import Network
from aerogel.model.quantized import clock_of
from aerogel.model.time_path import TemporalPath, check, find, sinusoids
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import Grid, dequantize, grid_from_range, quantize
from aerogel.numerics.scheme import PerToken, TensorScheme

_ROWS = TensorScheme(format_named("int8"), PerToken(), symmetric=False)


@dataclass(frozen=True)
class TimeTable(RuntimePolicy):
    """Looks the temporal features up in a table of all steps instead of computing them."""

    needs: ClassVar[frozenset[str]] = frozenset({"calls"})

    content: Literal["features", "path"] = "features"
    """What the table holds: the float network's features, for which the step comes before those that quantize the path; or what the path
    as it is by then gives, bit for bit."""
    dtype: Literal["int8", "float16"] = "float16"
    """How features are stored: int8 with a scale and a zero point a step, as published, or float16; `path` stores what it gets."""

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Run the path once a step, on one sample, and keep what it gives."""
        path, steps = find(network), steps_of(network.module, calls)
        self._require_content(path)
        check(network, path, calls[0])
        sinusoid_TC = sinusoids(network, path, calls[0], steps)
        clock = clock_of(network.module) or Clock(steps)
        rows = [self._row(path, clock, sinusoid_TC, row) for row in range(len(steps))]
        scheduler = getattr(network.processor, "scheduler", None)
        state: dict[str, Any] = {"steps": list(steps), "sampler": "" if scheduler is None else type(scheduler).__name__}
        for name in rows[0]:
            state |= self._stored(name, torch.cat([row[name] for row in rows]))
        return state

    @contextmanager
    def on(self, network: Network, state: dict[str, Any]) -> Iterator[None]:
        """Answer for the embedder and every projection out of the table; raises AerogelError at a step that is not in it."""
        path, followed = find(network), clock_of(network.module)
        clock = followed or Clock(state["steps"], state["sampler"])
        if clock.steps != tuple(state["steps"]):
            raise AerogelError(
                f"the table is of {len(state['steps'])} steps, the network's scales of {len(clock.steps)} others; calibrate both together"
            )
        modules = {**path.embedders, **path.projections}
        answers = {module: _answer(clock, self._table(name, state)) for name, module in modules.items()}
        with nullcontext() if followed else clock.on(network.module), answering(answers):
            yield

    def _require_content(self, path: TemporalPath) -> None:
        path.require_alone()
        quantized = [name for name, part in {**path.embedding_linears, **path.projections}.items() if isinstance(part, QuantLinear)]
        if quantized and self.content == "features":
            raise AerogelError(
                f"{quantized[0]} is quantized already, so the float features are gone: put time_table before the steps that quantize the "
                "temporal path, or give it content: path"
            )

    def _row(self, path: TemporalPath, clock: Clock, sinusoid_TC: Tensor, row: int) -> dict[str, Tensor]:
        """What the embedder and the projections give at one step."""
        with clock.at((row,)):
            embedded = {name: embedder(sinusoid_TC[row : row + 1]) for name, embedder in path.embedders.items()}
            return embedded | path.features(sinusoid_TC[row : row + 1])

    def _stored(self, name: str, feature_TC: Tensor) -> dict[str, Tensor]:
        if self.content == "path":
            return {name: feature_TC}
        if self.dtype == "float16":
            return {name: feature_TC.half()}
        grid = grid_from_range(feature_TC.amin(-1, keepdim=True), feature_TC.amax(-1, keepdim=True), _ROWS)
        assert grid.zero is not None, "rows are asymmetric"
        return {name: quantize(feature_TC, grid, _ROWS), f"{name}.scale": grid.scale, f"{name}.zero_point": grid.zero}

    def _table(self, name: str, state: dict[str, Any]) -> Tensor:
        """The features (T, C) as they are looked up."""
        kept: Tensor = state[name]
        if kept.is_floating_point():
            return kept
        return dequantize(kept, Grid(state[f"{name}.scale"], state[f"{name}.zero_point"]), _ROWS)


def _answer(clock: Clock, table_TC: Tensor) -> Callable[..., Tensor]:
    def look_up(x_NC: Tensor, *_: Any) -> Tensor:
        rows = clock.rows if len(clock.rows) == len(x_NC) else clock.rows * len(x_NC)
        table = table_TC.to(x_NC.device, x_NC.dtype)
        return table[rows[0]].expand(len(rows), -1) if len(set(rows)) == 1 else table[list(rows)]

    return look_up
