"""Exporting: a compressed folder, written anew for another engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.export.exporter import Exporter
from aerogel.io import save
from aerogel.recipe import build, knobs_of


def export(folder: Path, name: str, output: Path, overrides: Iterable[str] = ()) -> None:
    """Write `folder` to `output` by the exporter of this name; `overrides` are `exporter.knob=value`.

    Raises AerogelError for an unknown exporter or knob, for an output that holds something, and for what the format cannot express.
    """
    found: type[Exporter] = catalog.find("exporters", name)
    knobs = knobs_of(overrides, f"exporter.knob=value, for example {name}.knob=value")
    if others := [other for other in knobs if other != name]:
        raise AerogelError(f"a knob of {others[0]!r} is set, but the folder is exported by {name!r}")
    exporter = build(found, knobs.get(name, {}), f"exporter {name!r}")
    save.preflight(output, origin=folder)
    exporter.write(folder, output)
