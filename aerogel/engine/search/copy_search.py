"""The base of searches that compress copies of a model: data in two halves, findings that outlive a kill, and progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from aerogel.engine import provenance
from aerogel.engine.calibration import CalibrationInput, shown
from aerogel.engine.progress import Event, Tell
from aerogel.engine.search.judged_rows import JudgedRows
from aerogel.engine.search.judging_copies import judge_of, split
from aerogel.model.network import Network


class CopySearch(ABC):
    """A search on its way whose candidates are compressed copies of the model, judged on data that none of them has seen."""

    task: ClassVar[str]
    """Name of the search."""

    def __init__(self, tell: Tell, clock: Callable[[], float]) -> None:
        self._tell, self._clock = tell, clock
        self._left_out: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self._kept = JudgedRows(None, False, {})

    @property
    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """Return what a resumed search has to ask for as well: the budget, and the methods with their options."""

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """Raises AerogelError for data that the model cannot read."""
        self._network, self._wanted = network, shown(network, samples)

    def prepare(self, seed: int) -> dict[str, Any]:
        """Get what to calibrate on, and as much that is held out to judge by."""
        self._seed = seed
        self._calibration, held_out = split(self._network, self._wanted, seed)
        self._judge = judge_of(self._network, held_out)
        return self._calibration.facts

    def keep(self, folder: Path | None, resume: bool, fingerprint: str) -> None:
        """Keep what is judged in a folder; raises AerogelError for one of another search, and for an unfinished one that is not resumed."""
        made_of = {
            "task": self.task,
            "model": fingerprint,
            **self.asked,
            "seed": self._seed,
            "data": self._calibration.facts.get("fingerprint"),
            "versions": provenance.versions(),
            "device": self._network.device.type,
        }
        self._kept = JudgedRows(folder, resume, made_of)

    def finish(self) -> None:
        """Remove what was kept."""
        self._kept.remove()

    def _inside(self, at: Event, event: Event) -> None:
        """Tell how far a candidate has come."""
        if event.stage == "compress":
            self._tell(replace(at, inside=min(event.share, 1.0)))
