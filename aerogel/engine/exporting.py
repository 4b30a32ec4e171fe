"""Exporting: a compressed folder, written anew for another engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from aerogel import catalog
from aerogel.engine import policies
from aerogel.engine.opening import families, open_model
from aerogel.errors import AerogelError
from aerogel.export.exporter import Exporter, SavedPolicy, Source
from aerogel.io import engine_arguments, save
from aerogel.io.locks import locked
from aerogel.io.record import files
from aerogel.recipe import build, options_of


def export(folder: Path, name: str, output: Path, overrides: Iterable[str] = ()) -> None:
    """Write `folder` to `output` by the exporter of this name; `overrides` are `exporter.option=value`.

    Raises AerogelError for an unknown exporter or option, for an output that holds something, for a folder whose files were
    changed, and for what the format cannot express.
    """
    found: type[Exporter] = catalog.find("exporters", name)
    options = options_of(overrides, f"exporter.option=value, for example {name}.option=value")
    if others := [other for other in options if other != name]:
        raise AerogelError(f"an option of {others[0]!r} is set, but the folder is exported by {name!r}")
    exporter = build(found, options.get(name, {}), f"exporter {name!r}")
    with locked(output):
        save.preflight(output, origin=folder)
        files.verify(folder)
        if (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
            open_model(folder, device="cpu")  # raises where the weights are not those that the configuration describes
        source = source_of(folder)
        exporter.write(source, output)
    served = [policy for policy in source.policies if engine_arguments.are_in(output, policy.method.engine_arguments)]
    if lost := [policy.name for policy in source.policies if not exporter.carries(policy) and policy not in served]:
        warnings.warn(f"{output} runs without {' and '.join(lost)}, which {name} has no place for", stacklevel=2)


def source_of(folder: Path) -> Source:
    """Return a saved folder as exporters take it, with its runtime policies."""
    found = [SavedPolicy(measured.step.name, measured.step.method, measured.state) for measured in policies.load(folder)]
    return Source(folder, families(), found)
