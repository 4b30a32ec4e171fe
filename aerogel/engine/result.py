"""What a run gives back: the compressed network, what it cost and won, and the folder that holds both."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.older import upgraded
from aerogel.io.states import FACTS
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.report import page, record


class Result:
    """A compressed network with its recipe, metrics and journal."""

    def __init__(
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        measured: Sequence[policies.CalibratedPolicy],
        *,
        network: Network | None = None,
        folder: Path | None = None,
        keep: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.facts = facts
        """Everything that aerogel.json holds."""
        self.policies = list(measured)
        """Runtime policies with their states; `aerogel.engine.policies.on(network, policies)` puts them on."""
        self.folder = folder
        """Where it is saved, or None when it is in memory only."""
        self._network = network
        # What holds the folder of a result that was not asked to be saved lives as long as the result does.
        if keep is not None:
            weakref.finalize(self, shutil.rmtree, keep, ignore_errors=True)

    @property
    def network(self) -> Network:
        """The compressed network with its weights in memory."""
        if self._network is None:
            assert self.folder is not None
            self._network = open_model(self.folder, lazy=False)
        return self._network

    @property
    def metrics(self) -> dict[str, Any]:
        """{"compressed": {measure: facts}, "original": {...}}."""
        return self.facts["metrics"]

    @property
    def journal(self) -> list[dict[str, Any]]:
        """What methods noted, one entry a linear."""
        return self.facts["journal"]

    def add(self, **facts: Any) -> None:
        """Add to the facts, and to aerogel.json where the result is saved."""
        self.facts |= facts
        if self.folder is not None:
            _rewrite(self.folder, self.facts)

    def save(self, output: str | Path) -> Path:
        """Save as a folder that the ecosystem opens; raises AerogelError when it cannot be written or is not empty."""
        output = Path(output)
        save.preflight(output)
        with save.new_folder(output) as folder:
            if self.folder is not None:
                shutil.copytree(self.folder, folder, dirs_exist_ok=True)
            else:
                write(folder, self.network, self.facts, self.policies)
        if self.folder is None:
            self.folder = output
        return output

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report as one self-contained HTML file, by default report.html in the result's folder.

        Raises AerogelError when the result has no folder and no path is given.
        """
        if self.folder is not None:
            return page.write(self.folder, path)
        if path is None:
            raise AerogelError("this result is in memory only; give the report a path, or save the result first")
        Path(path).write_text(page.page(record.parse(self.facts)), encoding="utf-8")
        return Path(path)


def write(
    folder: Path, network: Network, facts: dict[str, Any], measured: Sequence[policies.CalibratedPolicy], tensors: Any = None
) -> None:
    """Write a network, its policies and the facts into a folder; the facts learn the checksums."""
    facts["checksums"] = save.write(network, folder, tensors)
    if measured:
        facts["policies"] = policies.save(measured, folder)
    (folder / FACTS).write_text(_as_json(facts))


def add_metrics(folder: Path | None, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Add measures to those that a saved result has; other folders are left alone."""
    if folder is not None and (folder / FACTS).is_file():
        facts = upgraded(json.loads((folder / FACTS).read_text()))
        for whose, measured in metrics.items():
            facts["metrics"].setdefault(whose, {}).update(measured)
        _rewrite(folder, facts)


def _rewrite(folder: Path, facts: Mapping[str, Any]) -> None:
    beside = folder / f".{FACTS}.new"
    beside.write_text(_as_json(facts))
    beside.replace(folder / FACTS)


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, default=str) + "\n"
