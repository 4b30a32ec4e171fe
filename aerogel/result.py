"""What a run gives back: the compressed network, what it cost and won, and the folder that holds both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aerogel import policies, report
from aerogel.model import save
from aerogel.model.load import load
from aerogel.model.network import Network
from aerogel.provenance import FACTS
from aerogel.recipe import Recipe


class Result:
    """A compressed network with its recipe, metrics and journal."""

    def __init__(
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        measured: Sequence[policies.Measured],
        *,
        network: Network | None = None,
        folder: Path | None = None,
        keep: TemporaryDirectory[str] | None = None,
    ) -> None:
        self.recipe = recipe
        self.facts = facts
        """Everything that aerogel.json holds."""
        self.policies = list(measured)
        """Runtime policies with their states; `aerogel.policies.on(network, policies)` puts them on."""
        self.folder = folder
        """Where it is saved, or None when it lives in memory only."""
        self._network = network
        # The folder of a result that was not asked to be saved lives as long as the result does.
        self._keep = keep

    @property
    def network(self) -> Network:
        """The compressed network with its weights in memory."""
        if self._network is None:
            assert self.folder is not None
            self._network = load(self.folder, lazy=False)
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
            beside = self.folder / f".{FACTS}.new"
            beside.write_text(as_json(self.facts))
            beside.replace(self.folder / FACTS)

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
        """Write the report as one self-contained HTML file, by default report.html in the result's folder."""
        if path is None:
            return report.write(self.folder or Path())
        path = Path(path)
        path.write_text(report.render(self.facts), encoding="utf-8")
        return path


def write(folder: Path, network: Network, facts: dict[str, Any], measured: Sequence[policies.Measured], tensors: Any = None) -> None:
    """Write a network, its policies and the facts into a folder; the facts learn the checksums."""
    facts["checksums"] = save.write(network, folder, tensors)
    if measured:
        facts["policies"] = policies.save(measured, folder)
    (folder / FACTS).write_text(as_json(facts))


def as_json(facts: Mapping[str, Any]) -> str:
    """Facts as a file holds them."""
    return json.dumps(facts, indent=2, default=str) + "\n"
