"""`search`: the best policy of a kind for a model, and what all others cost; the folder that holds it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from aerogel.data.sources import GIVEN
from aerogel.engine import policies, provenance
from aerogel.engine.calibration import GIVEN_CALLS, CalibrationInput
from aerogel.engine.estimates import needs_calls
from aerogel.engine.opening import load
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.preflight import partial_of
from aerogel.engine.progress import Tell, Watch
from aerogel.engine.requests import recipe_file_of
from aerogel.engine.search.caches import CacheSearch
from aerogel.engine.search.skips import SkipSearch
from aerogel.engine.search.sparsity import SparsitySearch
from aerogel.engine.search.structured import StructuredSearch
from aerogel.engine.search.tokens import TokenSearch
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.locks import locked
from aerogel.io.older import SCHEMA
from aerogel.io.record import files
from aerogel.io.record.measures import Metrics
from aerogel.io.record.schema import Provenance, RecipeRecord, Record
from aerogel.io.source import ModelSource
from aerogel.io.text_files import replace_text
from aerogel.model.experts import fuse
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device
from aerogel.recipe import Recipe
from aerogel.report import search as page

RECIPE = "recipe.yaml"
"""File of a search's folder with the best recipe, where it looks for one."""
Best = CalibratedPolicy | Recipe
"""Result that a search keeps: a policy with its state, or a recipe that `compress` runs."""


class Search(Protocol):
    """A search of one kind on its way; what it is asked for was looked at before."""

    @property
    def best(self) -> Best | None:
        """Return what is kept; None where nothing is good enough."""

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """See whether the network can be searched."""

    def prepare(self, seed: int) -> dict[str, Any]:
        """Get what policies are calibrated on; returns facts about it."""

    def bring(self) -> None:
        """Calibrate each policy for the budget."""

    def judge(self) -> dict[str, Any]:
        """Hold them against the network without any; the facts, best first."""


@runtime_checkable
class WeightSearch(Search, Protocol):
    """A search that changes the weights of copies: experts are linear layers for it, and what is judged outlives a kill."""

    def keep(self, folder: Path | None, resume: bool, fingerprint: str) -> None:
        """Keep what is judged in a folder, of a model with this fingerprint, or go on from what is there."""

    def finish(self) -> None:
        """Remove what was kept."""


TASKS: dict[str, Callable[..., Search]] = {
    "cache": CacheSearch, "skip": SkipSearch, "tokens": TokenSearch, "sparsity": SparsitySearch, "structured": StructuredSearch
}  # fmt: skip
"""Tasks of a search."""


class Findings:
    """Result of a search: every policy or recipe with its gain and cost, and the best one."""

    def __init__(self, facts: dict[str, Any], best: Best | None) -> None:
        self.facts = facts
        """Everything that search.json holds."""
        self.best = best
        """The policy with its state, or the recipe, that moves the model least; None where none meets the budget."""
        self.folder: Path | None = None
        """Folder in which it is saved."""

    def save(self, output: str | Path) -> Path:
        """Save as a folder with the report, without weights: `aerogel.cached` puts its policy on, `compress` runs its recipe.yaml.

        Raises AerogelError when it cannot be written or is not empty.
        """
        output = Path(output)
        with locked(output):
            self.save_locked(output)
        return output

    def save_locked(self, output: Path) -> None:
        """Save as a folder that is locked already."""
        save.preflight(output)
        made = [self.best] if isinstance(self.best, CalibratedPolicy) else []
        with save.new_folder(output) as folder:
            told = {"schema": self.facts["schema"], "model": self.facts["model"], "provenance": self.facts["provenance"]}
            records, checksums = policies.save(made, folder)
            record = Record(**told, recipe=_recipe_of(self.best), metrics=Metrics(), policies=records, checksums=checksums)
            files.write(folder, record)
            if isinstance(self.best, Recipe):
                (folder / RECIPE).write_text(recipe_file_of(_repeatable(record, self.best)), "utf-8")
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


def _recipe_of(best: Best | None) -> RecipeRecord:
    """The record's part on what is kept."""
    if isinstance(best, Recipe):
        return RecipeRecord(**best.as_dict())
    return RecipeRecord() if best is None else RecipeRecord(name=best.step.name, steps=[best.step.as_dict()])


def _repeatable(record: Record, best: Recipe) -> Record:
    """The record without data that the recipe does not read, or that no file can name: `compress` is given that again, in Python."""
    if needs_calls(best) and record.provenance.calibration.get("source") not in (GIVEN_CALLS, GIVEN):
        return record
    return record.replaced(provenance=Provenance.model_validate({**record.provenance.as_dict(), "calibration": {}}))


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
    resume: bool = False,
    tell: Tell = lambda event: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Findings:
    """Compare all methods of a kind (or `only` some) on a model at one budget, and keep the best; with `output` it is saved.

    `cache`: policies of reuse on a pipeline; the budget says how many times faster denoising has to be, "1.5x" unless told otherwise.
    `skip`: policies that skip experts of an MoE model; the budget is the share of dropped token-expert assignments, 0.67.
    `tokens`: policies that drop tokens, of images on chats and of long prompts on text or needle prompts; the budget says how many times
    faster prompts have to be read, "2x", or which share of the tokens may be computed, such as "25%".
    `sparsity`: recipes that prune a model; the budget is the share of zeros in the layers of its blocks, 0.5, a pattern such as "2:4", or
    the bytes that these layers may take, such as "40MB".
    `structured`: methods by which layers, channels, heads or filters leave a model; the budget says how many times as fast a forward has to
    be, "1.2x". A search for sparsity or structured methods that was killed goes on with `resume` where it stopped.
    `device` computes (see `load`).
    Speeds are measured by `rounds` turns with and without a policy. Raises AerogelError for an unknown task, a model that has nothing of
    the kind and a budget that is none; a policy that refuses the network or misses the budget is among the facts with its reason.
    """
    if task not in TASKS:
        raise AerogelError(f"{task!r} is nothing that can be searched for; known are {', '.join(TASKS)}")
    if rounds < 1:
        raise AerogelError(f"rounds is {rounds}; it is at least 1")
    made = TASKS[task](budget, only, overrides, rounds, tell, clock)
    if resume and (output is None or not isinstance(made, WeightSearch)):
        raise AerogelError("a search of weights that is saved to an output can be resumed (sparsity, structured); leave resume out")
    if output is None:
        return _findings(made, task, model, samples, None, seed, device, resume, tell)
    with locked(Path(output)):
        findings = _findings(made, task, model, samples, Path(output), seed, device, resume, tell)
        findings.save_locked(Path(output))
        if isinstance(made, WeightSearch):
            made.finish()
    return findings


def _findings(
    made: Search,
    task: str,
    model: Any,
    samples: CalibrationInput | None,
    output: Path | None,
    seed: int,
    device: Device,
    resume: bool,
    tell: Tell,
) -> Findings:
    watch = Watch(tell)
    with watch.stage("load", str(model) if isinstance(model, str | Path | ModelSource) else ""):
        changes_weights = isinstance(made, WeightSearch)
        network = load(model, lazy=False, unfuse_experts=changes_weights, device=device)
        if network is not model and not changes_weights:
            fuse(network.module)  # experts run as transformers runs them
    made.check(network, samples)
    if output is not None:
        save.preflight(output, origin=network.origin)
    with watch.stage("check", "what to calibrate on"):
        shown = made.prepare(seed)
        fingerprint = save.fingerprint_of(network)
        if isinstance(made, WeightSearch):
            made.keep(None if output is None else partial_of(output), resume, fingerprint)
    with watch.stage("compress"):
        made.bring()
    with watch.stage("evaluate"):
        facts = made.judge()
    facts |= {
        "schema": SCHEMA,
        "task": task,
        "model": provenance.model_of(network).as_dict() | {"fingerprint": fingerprint},
        "provenance": provenance.provenance_of(network, seed, shown).as_dict(),
        "timings": watch.seconds,
    }
    return Findings(facts, made.best)
