"""The result of a run: the compressed network, its record and the folder that holds both."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aerogel.engine import policies, structure_file
from aerogel.engine.opening import open_model
from aerogel.engine.stored_zeros import counted
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.locks import locked
from aerogel.io.record import files
from aerogel.io.record.schema import Record
from aerogel.io.source import ModelSource
from aerogel.io.text_files import replace_text
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device
from aerogel.recipe import Recipe
from aerogel.report import page


class Result:
    """A compressed network with its recipe, metrics and journal."""

    def __init__(
        self,
        recipe: Recipe,
        record: Record,
        measured: Sequence[policies.CalibratedPolicy],
        *,
        network: Network | None = None,
        folder: Path | None = None,
        keep: Path | None = None,
        device: Device = AUTO,
        source: ModelSource | None = None,
    ) -> None:
        self.recipe = recipe
        self.record = record
        """The content of aerogel.json, typed."""
        self.policies = list(measured)
        """Runtime policies with their states; `aerogel.engine.policies.on(network, policies)` puts them on."""
        self.folder = folder
        """Folder in which it is saved, or None when it is in memory only."""
        self._network = network
        self._device = device
        self._source = source
        # What holds the folder of a result that was not asked to be saved lives as long as the result does.
        if keep is not None:
            weakref.finalize(self, shutil.rmtree, keep, ignore_errors=True)

    @property
    def network(self) -> Network:
        """The compressed network with its weights in memory."""
        if self._network is None:
            assert self.folder is not None
            source = self._source.at(self.folder) if self._source else self.folder
            self._network = open_model(source, lazy=False, device=self._device)
        return self._network

    @property
    def facts(self) -> dict[str, Any]:
        """A copy of the record as plain data, with the keys of aerogel.json."""
        return self.record.as_dict()

    @property
    def metrics(self) -> dict[str, Any]:
        """A copy of the metrics as plain data: {"compressed": {measure: {figure: value}}, "original": {...}}."""
        return self.record.metrics.as_dict()

    @property
    def journal(self) -> list[dict[str, Any]]:
        """A copy of the notes of methods as plain data: one dict for each layer that a method changed."""
        return [line.as_dict() for line in self.record.journal]

    def add(self, **parts: Any) -> None:
        """Replace parts of the record, and write aerogel.json where the result is saved."""
        self.record = self.record.replaced(**parts)
        if self.folder is not None:
            files.write(self.folder, self.record)

    def save(self, output: str | Path) -> Path:
        """Save as a folder that the ecosystem opens; raises AerogelError when it cannot be written or is not empty."""
        output = Path(output)
        with locked(output):
            save_locked(self, output)
        return output

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report as one self-contained HTML file, by default report.html in the result's folder.

        Raises AerogelError when the result has no folder and no path is given.
        """
        if self.folder is not None:
            return page.write(self.folder, path)
        if path is None:
            raise AerogelError("this result is in memory only; give the report a path, or save the result first")
        return replace_text(path, page.page(self.record))


def save_locked(result: Result, output: Path) -> None:
    """Save a result as an output that is locked already."""
    save.preflight(output)
    with save.new_folder(output) as folder:
        if result.folder is not None:
            shutil.copytree(result.folder, folder, dirs_exist_ok=True)
        else:
            result.record = write(folder, result.network, result.record, result.policies)
    if result.folder is None:
        result.folder = output


def write(folder: Path, network: Network, record: Record, measured: Sequence[policies.CalibratedPolicy], tensors: Any = None) -> Record:
    """Write a network, its policies and its record into a folder; returns the record with checksums, policies and stored zeros added."""
    zeros: dict[str, float] = {}
    passing = counted(network, save.resident(network.module) if tensors is None else tensors, zeros)
    checksums = save.write(network, folder, passing, extras=policies.extras(measured))
    if zeros and record.coverage is not None:
        record = record.replaced(coverage={**record.coverage.as_dict(), "zeros": zeros})
    if measured:
        records, of_states = policies.save(measured, folder)
        record = record.replaced(policies=records)
        checksums |= of_states
    record = record.replaced(checksums=checksums)
    structure_file.keep(network, folder)
    files.write(folder, record)
    return record


def add_metrics(folder: Path | None, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Add measures to those that a saved result has; other folders are left alone."""
    if folder is not None and (folder / files.FILE).is_file():
        with locked(folder, patience=60):  # two that measure the same folder at once both add
            files.write(folder, files.read(folder).with_metrics(metrics))
