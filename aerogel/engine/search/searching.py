"""`search`: the best policy of a kind for a model, and what all others cost; the folder that holds it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from aerogel.engine import policies, provenance
from aerogel.engine.calibration import CalibrationInput
from aerogel.engine.opening import load
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.progress import Tell, Watch
from aerogel.engine.search.caches import CacheSearch
from aerogel.engine.search.skips import SkipSearch
from aerogel.engine.search.tokens import TokenSearch
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.locks import locked
from aerogel.io.older import SCHEMA
from aerogel.io.record import files
from aerogel.io.record.measures import Metrics
from aerogel.io.record.schema import RecipeRecord, Record
from aerogel.io.source import ModelSource
from aerogel.io.text_files import replace_text
from aerogel.model.experts import fuse
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device
from aerogel.report import search as page


class Search(Protocol):
    """A search of one kind on its way; what it is asked for was looked at before."""

    best: CalibratedPolicy | None
    """The policy that is kept, with its state; None where none is good enough."""

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """See whether the network can be searched."""

    def prepare(self, seed: int) -> dict[str, Any]:
        """Get what policies are calibrated on; returns facts about it."""

    def bring(self) -> None:
        """Calibrate each policy for the budget."""

    def judge(self) -> dict[str, Any]:
        """Hold them against the network without any; the facts, best first."""


TASKS: dict[str, Callable[..., Search]] = {"cache": CacheSearch, "skip": SkipSearch, "tokens": TokenSearch}
"""Tasks of a search."""


class Findings:
    """Result of a search: every policy with its gain and cost, and the best one calibrated."""

    def __init__(self, facts: dict[str, Any], best: CalibratedPolicy | None) -> None:
        self.facts = facts
        """Everything that search.json holds."""
        self.best = best
        """The policy that moves the network least, with its state; None where none meets the budget."""
        self.folder: Path | None = None
        """Folder in which it is saved."""

    def save(self, output: str | Path) -> Path:
        """Save as a folder with the report, which `aerogel.cached` puts on a model; weights are not in it.

        Raises AerogelError when it cannot be written or is not empty.
        """
        output = Path(output)
        with locked(output):
            self.save_locked(output)
        return output

    def save_locked(self, output: Path) -> None:
        """Save as a folder that is locked already."""
        save.preflight(output)
        made = [self.best] if self.best is not None else []
        recipe = RecipeRecord(name=made[0].step.name, steps=[made[0].step.as_dict()]) if made else RecipeRecord()
        with save.new_folder(output) as folder:
            told = {"schema": self.facts["schema"], "model": self.facts["model"], "provenance": self.facts["provenance"]}
            records, checksums = policies.save(made, folder)
            files.write(folder, Record(**told, recipe=recipe, metrics=Metrics(), policies=records, checksums=checksums))
            (folder / page.FILE).write_text(json.dumps(self.facts, indent=2, default=str) + "\n")
            page.write(folder)
        self.folder = output

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report as one self-contained HTML file, by default report.html in the folder.

        Raises AerogelError when nothing was saved and no path is given.
        """
        if self.folder is not None:
            return page.write(self.folder, path)
        if path is None:
            raise AerogelError("these findings are in memory only; give the report a path, or save them first")
        return replace_text(path, page.page(self.facts))


def search(
    model: Any,
    task: str = "cache",
    budget: float | str | None = None,
    *,
    samples: CalibrationInput | None = None,
    only: Sequence[str] = (),
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    seed: int = 0,
    device: Device = AUTO,
    rounds: int = 3,
    tell: Tell = lambda event: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Findings:
    """Compare all policies of a kind (or `only` some) on a model at one budget, and keep the best; with `output` it is saved.

    `cache`: policies of reuse on a pipeline; the budget says how many times faster denoising has to be, "1.5x" unless told otherwise.
    `skip`: policies that skip experts of an MoE model; the budget is the share of dropped token-expert assignments, 0.67.
    `tokens`: policies that drop tokens, of images on chats and of long prompts on text or needle prompts; the budget says how many times
    faster prompts have to be read, "2x", or which share of the tokens may be computed, such as "25%".
    `device` computes (see `load`).
    Speeds are measured by `rounds` turns with and without a policy. Raises AerogelError for an unknown task, a model that has nothing of
    the kind and a budget that is none; a policy that refuses the network or misses the budget is among the facts with its reason.
    """
    if task not in TASKS:
        raise AerogelError(f"{task!r} is nothing that can be searched for; known are {', '.join(TASKS)}")
    if rounds < 1:
        raise AerogelError(f"rounds is {rounds}; it is at least 1")
    made = TASKS[task](budget, only, overrides, rounds, tell, clock)
    if output is None:
        return _findings(made, task, model, samples, None, seed, device, tell)
    with locked(Path(output)):
        findings = _findings(made, task, model, samples, Path(output), seed, device, tell)
        findings.save_locked(Path(output))
    return findings


def _findings(
    made: Search,
    task: str,
    model: Any,
    samples: CalibrationInput | None,
    output: Path | None,
    seed: int,
    device: Device,
    tell: Tell,
) -> Findings:
    watch = Watch(tell)
    with watch.stage("load", str(model) if isinstance(model, str | Path | ModelSource) else ""):
        network = load(model, lazy=False, unfuse_experts=False, device=device)
        if network is not model:
            fuse(network.module)  # experts run as transformers runs them
    made.check(network, samples)
    if output is not None:
        save.preflight(output, origin=network.origin)
    with watch.stage("check", "what to calibrate on"):
        shown = made.prepare(seed)
    with watch.stage("compress"):
        made.bring()
    with watch.stage("evaluate"):
        facts = made.judge()
    facts |= {
        "schema": SCHEMA,
        "task": task,
        "model": provenance.model_of(network).as_dict() | {"fingerprint": save.fingerprint_of(network)},
        "provenance": provenance.provenance_of(network, seed, shown).as_dict(),
        "timings": watch.seconds,
    }
    return Findings(facts, made.best)
