"""The search for a cache: all policies at one measured speed, judged by the pictures that they make of held-out noise; the best is kept."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from aerogel.data.denoising import Denoising
from aerogel.engine import policies, provenance
from aerogel.engine.calibration import Calibration, Given, prepare, shown
from aerogel.engine.judging import Judge
from aerogel.engine.opening import load
from aerogel.engine.pacing import Attempt, Brought, Candidate, Pace, candidates, fewer_steps
from aerogel.engine.policies import Measured
from aerogel.engine.progress import Event, Tell, Watch
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import pipeline_of
from aerogel.methods.method import ReusePolicy
from aerogel.model import save
from aerogel.model.fingerprint import fingerprint
from aerogel.model.network import Network
from aerogel.model.reuse.compiled import uncompiled
from aerogel.model.reuse.units import units_of
from aerogel.model.states import FACTS
from aerogel.report import search as page
from aerogel.training.fit import watched

TASKS = ("cache",)
"""What can be searched for."""


class Findings:
    """What a search found: every policy with its speed and its error, and the best one made."""

    def __init__(self, facts: dict[str, Any], best: Measured | None) -> None:
        self.facts = facts
        """Everything that search.json holds."""
        self.best = best
        """The policy that moves the final latents least, with its state; None where none is fast enough."""
        self.folder: Path | None = None
        """Where it is saved."""

    def save(self, output: str | Path) -> Path:
        """Save as a folder with the report, which `aerogel.cached` puts on a pipeline; weights are not in it.

        Raises AerogelError when it cannot be written or is not empty.
        """
        output = Path(output)
        save.preflight(output)
        made = [self.best] if self.best is not None else []
        recipe = {"name": made[0].step.name, "steps": [made[0].step.as_dict()]} if made else {}
        with save.new_folder(output) as folder:
            told = {key: self.facts[key] for key in ("schema", "model", "provenance")}
            record = told | {"recipe": recipe, "metrics": {}, "policies": policies.save(made, folder)}
            for name, content in {FACTS: record, page.FILE: self.facts}.items():
                (folder / name).write_text(json.dumps(content, indent=2, default=str) + "\n")
            page.write(folder)
        self.folder = output
        return output

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report as one self-contained HTML file, by default report.html in the folder.

        Raises AerogelError when nothing was saved and no path is given.
        """
        if self.folder is not None:
            return page.write(self.folder, path)
        if path is None:
            raise AerogelError("these findings live in memory only; give the report a path, or save them first")
        Path(path).write_text(page.page(page.parse(self.facts)), encoding="utf-8")
        return Path(path)


def search(
    model: Any,
    task: str = "cache",
    budget: float | str = 1.5,
    *,
    samples: Given | None = None,
    only: Sequence[str] = (),
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    seed: int = 0,
    rounds: int = 3,
    tell: Tell = lambda event: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Findings:
    """Compare all caching policies (or `only` some) on a pipeline at one measured speed, and keep the best; with `output` it is saved.

    `budget` says how many times faster denoising has to be: 1.5 or "1.5x". Policies with a target speed-up are asked for it, those with a
    strength get the least one that is fast enough, by `rounds` turns with and without them. Errors are of as many pictures of other noise
    as were recorded. The same pipeline with fewer steps always stands beside them. Raises AerogelError for an unknown task, a model
    without a pipeline and a budget of no speed-up; a policy that refuses the network or is too slow is among the facts with its reason.
    """
    if rounds < 1:
        raise AerogelError(f"rounds is {rounds}; it is at least 1")
    wanted_speed, tried = _checked(task, budget), candidates(only, overrides)
    watch = Watch(tell)
    with watch.stage("load", str(model) if isinstance(model, str | Path) else ""):
        network = load(model, lazy=False)
    wanted = _pictures_of(network, samples)
    if output is not None:
        save.preflight(Path(output), origin=network.origin)
    with watch.stage("check", "pictures to calibrate on"):
        calibration = prepare(network, wanted, seed, head=False)
    turn = replace(wanted, count=min(wanted.count, wanted.batch))
    pace = Pace(network, turn, wanted_speed, seed + 1, rounds, clock)
    made = _Search(network, wanted, calibration, pace, seed, tell)
    with watch.stage("compress"):
        made.bring(tried)
    with watch.stage("evaluate"), uncompiled(network.module):  # what runs inside of blocks is looked at
        facts = made.judge()
    name = model if isinstance(model, str) and not Path(model).exists() else None
    facts |= {
        "schema": provenance.SCHEMA,
        "task": task,
        "budget": wanted_speed,
        "model": provenance.model_facts(network, name) | {"fingerprint": fingerprint(save.resident(network.module))},
        "provenance": provenance.run_facts(network, seed, calibration.facts),
        "timings": watch.seconds,
    }
    findings = Findings(facts, made.best)
    if output is not None:
        findings.save(output)
    return findings


def _checked(task: str, budget: float | str) -> float:
    """The budget as a number."""
    if task not in TASKS:
        raise AerogelError(f"{task!r} is nothing that can be searched for; known is {', '.join(TASKS)}")
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[x×]?\s*", str(budget))
    if read is None or float(read[1]) <= 1:
        raise AerogelError(f"budget {budget!r} is no speed-up; give how many times faster denoising has to be, for example 1.5x")
    return float(read[1])


def _pictures_of(network: Network, samples: Given | None) -> Denoising:
    """Which pictures to compare policies on."""
    wanted = shown(network, samples)
    if not isinstance(wanted, Denoising):
        raise AerogelError("policies are compared by the pictures that a pipeline makes: give a Denoising as samples, not recorded calls")
    pipeline_of(network)
    units_of(network)
    on = [measured.step for measured in policies.load(network.origin) if isinstance(measured.step.method, ReusePolicy)]
    if on:
        raise AerogelError(f"{network.origin} has {on[0].name} on already; give the pipeline that it was made for")
    return wanted


class _Search:
    """A search on its way."""

    def __init__(self, network: Network, wanted: Denoising, calibration: Calibration, pace: Pace, seed: int, tell: Tell) -> None:
        self.network, self.wanted, self.pace, self.tell = network, wanted, pace, tell
        self._calls, self._seed = calibration.calls, seed
        self._attempts: list[Attempt] = []
        self._fewer: tuple[int, float] | None = None
        self._without = ""
        self.best: Measured | None = None

    def bring(self, tried: Sequence[Candidate]) -> None:
        """Bring each policy to the budget, and the pipeline alone by fewer steps."""
        total = len(tried) + 1
        for number, candidate in enumerate(tried):
            at = Event("compress", number, total, candidate.name)
            self.tell(at)
            self._attempts.append(Attempt(candidate, self._calls, self.pace, self._seed))
            with watched(partial(self._inside, at)):
                self._attempts[-1].run()
        self.tell(Event("compress", total - 1, total, "fewer steps"))
        try:
            self._fewer = fewer_steps(self.pace)
        except AerogelError as error:
            self._without = str(error)

    def judge(self) -> dict[str, Any]:
        """Hold all that is fast enough against the whole network on other noise; the facts, best first."""
        brought = [(attempt, attempt.brought) for attempt in self._attempts if attempt.brought is not None]
        total = len(brought) + 2
        self.tell(Event("evaluate", 0, total, "the whole network"))
        judge = Judge(self.network, self.wanted, self.pace.seed)
        judged = []
        for number, (attempt, found) in enumerate(brought, 1):
            self.tell(Event("evaluate", number, total, attempt.candidate.name))
            judged.append((_row(attempt, found) | judge.policy(partial(policies.on, self.network, [found.measured])), found.measured))
        self.tell(Event("evaluate", total - 1, total, "fewer steps"))
        judged.sort(key=lambda pair: (not math.isfinite(pair[0]["error"]), pair[0]["error"]))
        if judged and math.isfinite(judged[0][0]["error"]):
            self.best = judged[0][1]
        return self._conditions(judge) | {
            "rows": [row for row, _ in judged],
            "fewer": None if self._fewer is None else self._of_fewer(judge, *self._fewer),
            "without_fewer": self._without,
            "left_out": [
                {"policy": attempt.candidate.name, "reason": attempt.reason, "tries": _tries(attempt)}
                for attempt in self._attempts
                if attempt.brought is None
            ],
        }

    def _conditions(self, judge: Judge) -> dict[str, Any]:
        return {
            "sampler": type(self.network.processor.scheduler).__name__,
            "steps": judge.steps,
            "units": list(judge.units),
            "guidance": self.wanted.guidance,
            "count": self.wanted.count,
            "held_out_seed": self.pace.seed,
            "batch": self.pace.wanted.count,
            "rounds": self.pace.rounds,
            "seconds": median(self.pace.whole) if self.pace.whole else None,
            "variance": judge.variance,
            "pictures": judge.pictures,
            "subjects": judge.subjects,
        }

    def _of_fewer(self, judge: Judge, steps: int, speedup: float) -> dict[str, Any]:
        return {"policy": "fewer steps", "knob": "steps", "value": steps, "speedup": speedup, **judge.fewer(steps)}

    def _inside(self, at: Event, share: float) -> None:
        self.tell(replace(at, inside=share))


def _row(attempt: Attempt, found: Brought) -> dict[str, Any]:
    return {
        "policy": attempt.candidate.name,
        "knob": attempt.candidate.knob,
        "value": found.at.value,
        "step": found.measured.step.as_dict(),
        "speedup": found.at.speedup,
        "seconds": found.at.seconds,
        "tries": _tries(attempt),
    }


def _tries(attempt: Attempt) -> list[dict[str, Any]]:
    return [one._asdict() for one in attempt.tries]
