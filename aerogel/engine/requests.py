"""A run as it is asked for: what its recipe file says about model, data and output, and the arguments of the command line, which win.

`recipe_file_of` goes the other way: from the record of a run to a file that repeats it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from aerogel.data.denoising import Denoising
from aerogel.data.sources import GIVEN
from aerogel.engine.calibration import GIVEN_CALLS, CalibrationRequest
from aerogel.engine.estimates import needs_calls
from aerogel.engine.preflight import check_finished
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.record.schema import Record
from aerogel.io.source import ModelSource, locate
from aerogel.model.placement import AUTO, find_device
from aerogel.recipe import DataSettings, ModelSettings, Recipe

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes to compute in by the names that users give; auto is that of the checkpoint, or float32 where a CPU does not compute in it."""
_GENERATED = ("steps", "guidance", "height", "width", "num_frames")
_DATA = {
    "source": "source",
    "column": "column",
    "samples": "count",
    "length": "length",
    "prompts": "prompts",
    **{name: name for name in _GENERATED},
}
"""Keys of `data` in a recipe file, and the fields of CalibrationRequest."""
_FLAGS = {"source": "--data"}
"""Arguments of the command line that have another name than the key of `data`."""


@dataclass(frozen=True)
class ModelOptions:
    """Arguments that say how a model is opened."""

    dtype: str | None = None
    """A name of DTYPES; None leaves it to the recipe file."""
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = AUTO
    """The device that computes: auto, cpu, cuda, cuda:1, mps, xpu."""
    merge_adapter: bool = False

    def locate(self, name: str) -> ModelSource:
        """Find a model, and fetch it from the hub where it is not here.

        Raises AerogelError where it cannot be had, and before that where the device is not here.
        """
        find_device(self.device)
        return locate(
            name,
            revision=self.revision,
            dtype=DTYPES[self.dtype or "auto"],
            trust_remote_code=self.trust_remote_code,
            merge_adapter=self.merge_adapter,
        )

    def locate_pair(self, name: str, against: str | None) -> tuple[ModelSource, ModelSource | None]:
        """Find a model and the one it is compared with; the revision is that of the one which is from the hub.

        Raises AerogelError where either cannot be had, and for a revision where both are from the hub.
        """
        if against is None:
            return self.locate(name), None
        here = dataclasses.replace(self, revision=None)
        if self.revision is None:
            return here.locate(name), here.locate(against)
        local = [Path(each).expanduser().exists() for each in (name, against)]
        if not any(local):
            raise AerogelError(f"--revision could be of {name} or of {against}; download one of them, and give its folder")
        return (here.locate(name), self.locate(against)) if local[0] else (self.locate(name), here.locate(against))


@dataclass(frozen=True)
class Adjustments:
    """Arguments that change a recipe."""

    overrides: Iterable[str] = ()
    """method.option=value"""
    scheme: str | None = None
    targets: Iterable[str] = ()
    ignore: Iterable[str] = ()


_LARGEST_BATCH = 1_000_000


@dataclass(frozen=True)
class RunRequest:
    """One run: the recipe, the model, the calibration data, the output folder and the seed."""

    recipe: Recipe
    model: str
    options: ModelOptions
    samples: CalibrationRequest = field(default_factory=CalibrationRequest)
    batch_size: int | Literal["auto"] = AUTO
    """Sequences, chats or images in one call of the calibration."""
    seed: int = 0
    output: Path | None = None

    @classmethod
    def of(
        cls,
        recipe: str,
        *,
        model: str | None = None,
        options: ModelOptions = ModelOptions(),
        adjustments: Adjustments = Adjustments(),
        samples: CalibrationRequest | None = None,
        batch_size: str | None = None,
        seed: int | None = None,
        output: Path | None = None,
    ) -> RunRequest:
        """Put a recipe, by name or from a file, and the arguments together; None is what was not given.

        Raises AerogelError for a recipe that cannot be read or adjusted, when neither names a model, and for calibration data that no step
        of the recipe reads.
        """
        parsed, settings = Recipe.parse_run(recipe, adjustments.overrides)
        parsed = parsed.adjusted(adjustments.scheme, adjustments.targets, adjustments.ignore)
        named = settings.model
        name = model or (named.name if named else None)
        if name is None:
            raise AerogelError(f"no model is given: add MODEL, or `model` to the recipe file (recipe {parsed.name!r} has none)")
        samples = samples or CalibrationRequest()
        _require_read(parsed, samples, settings.data, batch_size)
        return cls(
            parsed,
            name,
            _model_options(options, named, name),
            _samples(samples, settings.data),
            _batch_size(batch_size, settings.data),
            seed if seed is not None else settings.data.seed or 0,
            output or (Path(settings.output).expanduser() if settings.output else None),
        )

    def locate(self) -> ModelSource:
        """Find the model, and fetch it from the hub where it is not here; raises AerogelError where it cannot be had."""
        return self.options.locate(self.model)

    def require_output(self) -> Path:
        """Return the output folder; raises AerogelError when neither the file nor the command line names one."""
        if self.output is None:
            raise AerogelError(f"no output is given: add --output, or `output` to the recipe file (recipe {self.recipe.name!r} has none)")
        return self.output

    def check_output(self) -> None:
        """Make sure, before anything is downloaded, that the output can be written; raises AerogelError that says what is in the way."""
        output = self.require_output()
        check_finished(output)
        save.preflight(output)


def _model_options(given: ModelOptions, named: ModelSettings | None, name: str) -> ModelOptions:
    """The arguments, and from the file what they leave open; a revision there is of the model there."""
    if named is None:
        return given
    revision = given.revision or (named.revision if named.name == name else None)
    return dataclasses.replace(given, dtype=given.dtype or named.dtype, revision=revision)


def _require_read(recipe: Recipe, given: CalibrationRequest, data: DataSettings, batch_size: str | None) -> None:
    """Raise AerogelError where calibration data is named, by arguments or in the file, and no step of the recipe reads any."""
    if needs_calls(recipe):
        return
    asked = [_FLAGS.get(key, f"--{key.replace('_', '-')}") for key, ours in _DATA.items() if getattr(given, ours) is not None]
    asked += ["--batch-size"] if batch_size not in (None, AUTO) else []
    asked += [f"data.{key} in its file" for key in (*_DATA, "batch_size") if getattr(data, key) is not None]
    if asked:
        them = "it" if len(asked) == 1 else "them"
        steps = ", ".join(step.name for step in recipe.steps)
        raise AerogelError(
            f"recipe {recipe.name!r} reads no calibration data (its steps: {steps}), so {' and '.join(asked)} would have no effect; "
            f"leave {them} out, or take a recipe that calibrates, such as gptq-w4a16"
        )


def _samples(given: CalibrationRequest, data: DataSettings) -> CalibrationRequest:
    found = {ours: getattr(data, theirs) for theirs, ours in _DATA.items()}
    found["prompts"] = None if data.prompts is None or given.source is not None else tuple(data.prompts)
    found["column"] = None if given.source is not None else data.column  # of the file's own source
    return CalibrationRequest(**{**found, **{key: value for key, value in vars(given).items() if value is not None}})


def recipe_file_of(record: Record) -> str:
    """Return a recipe file (YAML) that repeats a recorded run once an output is added; its recipe has every option spelled out.

    Raises AerogelError for a run that was calibrated on what no file can name.
    """
    model = record.model
    settings = {
        "name": record.recipe.name,
        "model": None if model.source is None else _said(name=model.source, revision=model.revision, dtype=model.compute_dtype),
        "data": _said(**_data(record.provenance.calibration), seed=record.provenance.seed),
        "steps": record.recipe.steps,
    }
    versions = ", ".join(f"{name} {version}" for name, version in record.provenance.versions.items())
    lines = [f"# A run of {record.provenance.date or 'an unknown date'} with {versions or 'unknown versions'}."]
    lines += ["# It repeats with: aerogel compress --recipe THIS_FILE --output OUT"]
    lines += ["# The model was an object in Python: add MODEL to the command."] if model.source is None else []
    text = yaml.safe_dump(_said(**settings), sort_keys=False, width=120, allow_unicode=True)
    return "\n".join([*lines, text])


def _data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration data of a run as a recipe file names it."""
    if facts.get("source") in (GIVEN_CALLS, GIVEN):
        what = str(facts["source"]).removeprefix("given ")
        raise AerogelError(f"this run was calibrated on {what} that were given in Python, which no recipe file can name")
    if "sampler" not in facts:
        return {"source": facts.get("source"), "column": facts.get("column"), "samples": facts.get("count"), "length": facts.get("length")}
    given = {key: facts.get(key) for key in _GENERATED}
    batch = facts.get("batch", Denoising.batch)
    given["batch_size"] = None if batch == Denoising.batch else batch
    return {"prompts": facts.get("prompts") or None, "samples": facts.get("count"), **given}


def _batch_size(given: str | None, data: DataSettings) -> int | Literal["auto"]:
    """The calls of the calibration: the argument, else what the file says; raises AerogelError for what is neither auto nor a count."""
    if given is None:
        return data.batch_size or AUTO
    if given == AUTO:
        return AUTO
    if not (given.isascii() and given.isdecimal()) or not 1 <= int(given[:20]) <= _LARGEST_BATCH:
        raise AerogelError(f"--batch-size {given} is neither auto nor a whole number from 1 to {_LARGEST_BATCH:,}")
    return int(given)


def _said(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
