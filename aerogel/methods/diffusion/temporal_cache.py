"""Cache-based maintenance: the temporal path is not run at all, its features are looked up in a table (arXiv:2407.19547).

T steps, C width of a feature. The paper's abstract names the idea; the layout of the table, its dtypes and the choice of contents are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.layers.linear import timestep_index_of
from aerogel.layers.lookup import Lookup, dequantized
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.methods.base import Requirement, RuntimePolicy
from aerogel.model.calls import Call
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network
from aerogel.model.time_path import features_of, find
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import Grid, grid_from_range, quantize
from aerogel.numerics.scheme import PerToken, TensorScheme
from aerogel.runtime.policy_state import PolicyState, by_name

Choice = Literal["all", "layer", "layer_step"]


@dataclass(frozen=True, eq=False)
class TemporalCacheState(PolicyState):
    """The tables, and the steps that their rows are of."""

    steps: tuple[float, ...]
    """The sampler's time steps, in order."""
    sampler: str
    """Class of the scheduler; empty where the model came without one."""
    tables: Mapping[str, Tensor] = by_name()
    """By layer: `layer` (T, C) as it is stored, `layer.scale` and `layer.zero_point` where these are integer codes; the squared errors
    `layer.table_error` and `layer.path_error` (T), and `layer.chosen` (T), True where the table is nearer or has to answer."""


@dataclass(frozen=True)
class TemporalCache(RuntimePolicy[TemporalCacheState]):
    """Reads the temporal features from a table of all steps instead of computing them."""

    state: ClassVar[type[PolicyState]] = TemporalCacheState

    content: Literal["features", "path"] = "features"
    """Content of the table: the features of the original model, or those of the path in its current state, bit for bit."""
    dtype: Literal["int4", "int5", "int6", "int8", "float16"] = "float16"
    """Storage of features: integers with a scale and a zero point a step, int8 as published, or float16. `path` stores what it gets."""
    choose: Choice = "all"
    """Layers in which the table answers: all; those for which it is nearer to the original features than the path is, summed over steps;
    or at each step of a layer by itself, for which the path has to stay."""

    @property
    def requires(self) -> frozenset[Requirement]:  # type: ignore[override]
        """Calls, and the network before any step for its features."""
        return frozenset({"calls", "time_path", "teacher"} if self.content == "features" else {"calls", "time_path"})

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> TemporalCacheState:
        """Run the path once a step, on one sample, and keep what it gives; raises AerogelError where it is not of the step alone."""
        find(network).require_alone()
        steps = Trajectories.of(network, calls).distinct_steps
        own = features_of(network, calls[0], steps)
        teacher = (network.teacher or network) if self.content == "features" else network
        wanted = own if teacher is network else features_of(teacher, calls[0], steps)
        scheduler = getattr(network.processor, "scheduler", None)
        tables: dict[str, Tensor] = {}
        for name, feature_TC in wanted.items():
            tables |= self._stored(name, feature_TC)
            table_T, path_T = ((given - feature_TC).float().square().sum(-1) for given in (looked_up_features(tables, name), own[name]))
            errors = {f"{name}.table_error": table_T, f"{name}.path_error": path_T}
            tables |= errors | {f"{name}.chosen": chosen(table_T, path_T, self.choose)}
        return TemporalCacheState(tuple(steps), "" if scheduler is None else type(scheduler).__name__, tables)

    @contextmanager
    def on(self, network: Network, state: TemporalCacheState) -> Iterator[None]:
        """Answer for the embedder and the projections out of the table; raises AerogelError at a step that is not in it."""
        path, followed = find(network), timestep_index_of(network.module)
        index = followed or TimestepIndex(state.steps, state.sampler)
        if index.steps != state.steps:
            raise AerogelError(
                f"the table is of {len(state.steps)} steps, the model's scales of {len(index.steps)} others; calibrate both together"
            )
        index.set_pipeline(network.processor)
        modules = dict(path.projections)
        if lost := sorted({key for name in modules for key in (name, f"{name}.chosen")} - state.tables.keys()):
            raise AerogelError(f"temporal_cache: its saved state has no field {lost[0]!r}; calibrate the policy anew")
        if all(bool(state.tables[f"{name}.chosen"].all()) for name in modules):
            modules |= path.embedders  # nobody reads what they would compute
        # Forwards are replaced, not modules: names and kinds of layers stay, by which weights are saved and resumed while the policy is on.
        answers = {
            module: Lookup(
                index, *_stored_table(state.tables, name), state.tables[f"{name}.chosen"] | (name in path.embedders), module.forward
            )
            for name, module in modules.items()
        }
        with nullcontext() if followed else index.on(network.module), patch_forward(answers):
            yield

    @property
    def _rows(self) -> TensorScheme:
        return TensorScheme(format_named("int8" if self.dtype == "float16" else self.dtype), PerToken(), symmetric=False)

    def _stored(self, name: str, feature_TC: Tensor) -> dict[str, Tensor]:
        if self.content == "path":
            return {name: feature_TC}
        if self.dtype == "float16":
            return {name: feature_TC.half()}
        grid = grid_from_range(feature_TC.amin(-1, keepdim=True), feature_TC.amax(-1, keepdim=True), self._rows)
        assert grid.zero is not None, "rows are asymmetric"
        return {name: quantize(feature_TC, grid, self._rows), f"{name}.scale": grid.scale, f"{name}.zero_point": grid.zero}


def looked_up_features(tables: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the features (T, C) of a layer as they are looked up."""
    return dequantized(*_stored_table(tables, name))


def _stored_table(tables: Mapping[str, Tensor], name: str) -> tuple[Tensor, Grid | None]:
    """The table as it is stored, and the grid of its integer codes where it holds codes."""
    stored = tables[name]
    return stored, None if stored.is_floating_point() else Grid(tables[f"{name}.scale"], tables[f"{name}.zero_point"])


def chosen(table_error_T: Tensor, path_error_T: Tensor, choose: Choice) -> Tensor:
    """Return at which steps (T) a layer is answered from the table; a tie goes to the table."""
    if choose == "layer_step":
        return table_error_T <= path_error_T
    take = choose == "all" or bool(table_error_T.sum() <= path_error_T.sum())
    return torch.full_like(table_error_T, take, dtype=torch.bool)
