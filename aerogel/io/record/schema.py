"""The schema of aerogel.json: what was compressed, how, with what result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field

from aerogel.io.older import SCHEMA
from aerogel.io.record.measures import Metrics
from aerogel.io.record.part import OpenPart, Part


class ModelRecord(Part):
    """The model that was compressed."""

    name: str
    family: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    """The dtype that float weights have on disk."""
    source: str | None = None
    """The folder, hub id or reference model, as it was asked for."""
    revision: str | None = None
    """The commit of a model of the hub."""
    compute_dtype: str | None = None
    """The dtype that was asked for to compute in."""
    fingerprint: str | None = None
    """Of the weights, where policies are saved without them."""
    quantization: dict[str, Any] | None = None
    """The quantization_config, where policies are saved without weights."""


class RecipeRecord(Part):
    """The recipe with every option resolved."""

    name: str | None = None
    steps: list[dict[str, Any]] = Field(default_factory=list)
    """{method: options} in their order."""


def _with_sizes(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts about calibration data; raises ValueError for a size that is no whole number."""
    for name in ("count", "length", "batch", "steps", "height", "width", "num_frames"):
        if (size := facts.get(name)) is not None and not isinstance(size, int):
            raise ValueError(f"{name} is {size!r}, expected a whole number")
    return facts


class Provenance(Part):
    """When, with what and on what a run was made."""

    date: str | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | int] = Field(default_factory=dict)
    calibration: Annotated[dict[str, Any], AfterValidator(_with_sizes)] = Field(default_factory=dict)
    """Source, size and fingerprint of the calibration data, as its kind has them."""
    dequantized: str | None = None
    """How the weights that the run started from were quantized, and to which floats they were dequantized, in words."""


class PlanRecord(Part):
    """Predictions made before the run."""

    layers: int | None = None
    """Layers that the recipe changes."""
    share_reached: float | None = None
    """Share of the parameters that the recipe changes."""
    predicted_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """Of the host."""
    device_memory_bytes: int | None = None
    """Of the accelerator."""


class KeptModule(Part):
    """A module that was not quantized."""

    name: str
    parameters: int = 0
    reason: str = "no reason recorded"


class Coverage(Part):
    """Layers by the formats of their weights and inputs, and attention modules with quantized operands."""

    layers: int
    weights: dict[str, int] = Field(default_factory=dict)
    """Number of layers by format."""
    inputs: dict[str, int] = Field(default_factory=dict)
    unquantized_weights: list[str] = Field(default_factory=list)
    unquantized_inputs: list[str] = Field(default_factory=list)
    attentions: list[str] = Field(default_factory=list)
    zeros: dict[str, float] = Field(default_factory=dict)
    """Share of zeros of each pruned layer, as it is stored."""

    @property
    def any(self) -> bool:
        """True where anything is quantized."""
        return bool(self.weights or self.inputs or self.attentions)


class JournalLine(OpenPart):
    """A note of a method about one layer, with whatever else the method tells."""

    name: str
    block: str = ""
    method: str | None = None
    scheme: str | None = None
    error: float | None = None
    """Relative squared error of the layer's output, or of its weight."""
    error_of: Literal["outputs", "weights"] | None = None
    """Part of the layer whose error that is; None in records of releases that did not say it."""
    sparsity: float | None = None
    """Share of the layer's weights that is zero."""
    allocated: float | None = None
    """Share of zeros that an allocation step gave the layer."""
    fallback: str | None = None
    """Reason why the layer was not compressed as the recipe says."""
    step_size: float | None = None
    """Learned step size of an attention operand; such a line is of no layer."""

    @property
    def kind(self) -> str:
        """The layer's place in its block, the same in every block and for every expert."""
        return kind_of(self.name, self.block)


class PolicyRecord(Part):
    """A runtime policy with its calibrated state; tensors of the state are in a file of their own."""

    step: dict[str, dict[str, Any]]
    """{method: options}."""
    state: dict[str, Any] = Field(default_factory=dict)


class Record(Part):
    """One run: the content of aerogel.json."""

    schema_number: int = Field(default=SCHEMA, validation_alias="schema", serialization_alias="schema")
    model: ModelRecord
    recipe: RecipeRecord = RecipeRecord()
    provenance: Provenance = Provenance()
    metrics: Metrics = Metrics()
    journal: list[JournalLine] = Field(default_factory=list)
    kept: list[KeptModule] = Field(default_factory=list)
    plan: PlanRecord = PlanRecord()
    coverage: Coverage | None = None
    checksums: dict[str, str] = Field(default_factory=dict)
    """{file: "sha256:..."} of the files with tensors, relative to the folder."""
    policies: list[PolicyRecord] = Field(default_factory=list)
    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds by stage."""
    folder: str = Field(default="", exclude=True)
    """Name of the folder that it was read from; not written."""

    @property
    def label(self) -> str:
        """The run's name in figures: that of its recipe, else of its folder."""
        return self.recipe.name or self.folder or "this run"

    def replaced(self, **parts: Any) -> Self:
        """Return a record in which these parts, given as plain data or as parts, are replaced; they are checked."""
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**own, **parts})

    def with_metrics(self, metrics: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a record with these {"original" or "compressed": {measure: figures}} added to its metrics."""
        found = self.metrics.as_dict()
        return self.replaced(metrics={**found, **{side: {**found.get(side, {}), **measured} for side, measured in metrics.items()}})


def kind_of(name: str, block: str) -> str:
    """Return a layer's place in its block, the same in every block and for every expert."""
    return pattern(name.removeprefix(f"{block}.") if block else name)


def pattern(name: str) -> str:
    """Return a dotted name with its numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
