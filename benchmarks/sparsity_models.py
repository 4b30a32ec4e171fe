"""What zeros cost the zoo's classifier and denoisers: criteria, allocations and adjustments at several shares; run by sparsity.py --model.

A cell is written as soon as it is measured, and a later run under the same settings goes on with those that are missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, ROOT, write
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine.search.judging_copies import OutputJudge, split
from aerogel.engine.search.pruning_recipes import Budget, Prunable
from aerogel.engine.search.sparsity import copy_of
from aerogel.model.calls import Call
from aerogel.model.network import Network

Steps = list[dict[str, Any]]
BUDGETS = ["0.3", "0.5", "0.6", "0.7", "0.8", "2:4", "4:8"]
CRITERIA = ["magnitude", "wanda", "ria", "sparsegpt"]
ALLOCATIONS: list[tuple[str, dict[str, Any]]] = [
    ("erk", {"power": 1.0}), ("erk", {"power": 0.5}), ("global_magnitude", {}), ("layer_norm_magnitude", {}), ("lamp", {}),
    ("energy_table", {}),
]  # fmt: skip
RECONSTRUCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("bias_correction", {}), ("weight_correction", {}), ("reconstruct", {"granularity": "block", "steps": 100, "rate": 3e-4})
]  # fmt: skip
BESIDE = ["magnitude", "sparsegpt"]
"""Criteria that allocations and adjustments are tried with, unless all are asked for."""


@dataclass(frozen=True)
class Row:
    """A criterion, with what is done before and after it."""

    criterion: str
    allocation: tuple[str, dict[str, Any]] | None = None
    reconstruction: tuple[str, dict[str, Any]] | None = None

    @property
    def cells(self) -> list[str]:
        """The methods in words."""
        parts = [self.allocation or ("uniform", {}), (self.criterion, {}), self.reconstruction or ("none", {})]
        return [f"{name} {' '.join(f'{key} {value}' for key, value in options.items())}".strip() for name, options in parts]

    def steps(self, budget: Budget, prunable: Prunable) -> Steps:
        """Return the recipe's steps; none for a pattern with an allocation, where every layer has the same share."""
        if self.allocation is not None and budget.pattern != "unstructured":
            return []
        where, share = {name: list(value) for name, value in prunable.options.items()}, budget.share
        own = {"sparsity": None if self.allocation else share, "pattern": budget.pattern}
        steps: Steps = [{self.criterion: {**where, **own}}]
        if self.allocation:
            steps.insert(0, {self.allocation[0]: {**self.allocation[1], **where, "sparsity": share}})
        if self.reconstruction:
            steps.append({self.reconstruction[0]: self.reconstruction[1]})
        return steps


def rows(full: bool) -> list[Row]:
    """Every criterion alone; allocations and adjustments with two of them, or the whole product."""
    if full:
        whole = product(CRITERIA, [None, *ALLOCATIONS], [None, *RECONSTRUCTIONS])
        return [Row(criterion, allocation, behind) for criterion, allocation, behind in whole]
    return [
        *(Row(name) for name in CRITERIA),
        *(Row(name, allocation=rule) for rule in ALLOCATIONS for name in BESIDE),
        *(Row(name, reconstruction=behind) for behind in RECONSTRUCTIONS for name in BESIDE),
    ]


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated on, and the figure that tells what zeros cost."""

    network: Network
    calls: Sequence[Call]
    figure: str
    measure: Callable[[Network], float]
    settings: dict[str, Any]


def classifier() -> Subject:
    """The classifier of Fashion-MNIST, by its accuracy on test images."""
    sys.path.insert(0, str(ROOT / "zoo"))
    import fashion

    images_N1HW, _ = fashion.load("train")
    calls = [Call((), {"pixel_values": some}) for some in images_N1HW[:512].split(64)]
    held_out_N1HW, labels_N = (part[:2000] for part in fashion.load("t10k"))
    network = aerogel.load(ROOT / "zoo" / "fashion-judge", lazy=False)
    settings = {"accuracy of the original": round(accuracy(held_out_N1HW, labels_N, network), 4), "calibration": "512 training images"}
    return Subject(network, calls, "accuracy", partial(accuracy, held_out_N1HW, labels_N), {**settings, "held out": "2,000 test images"})


def accuracy(images_N1HW: Tensor, labels_N: Tensor, network: Network) -> float:
    """Return the share of the images whose class is found."""
    right = [
        (network.run(Call((), {"pixel_values": some})).logits.argmax(-1) == true).sum()
        for some, true in zip(images_N1HW.split(250), labels_N.split(250), strict=True)
    ]
    return int(torch.stack(right).sum()) / len(labels_N)


def denoiser(name: str) -> Subject:
    """A denoiser of the zoo, by the error of its output at every step of generations from other noise."""
    network = aerogel.load(ROOT / "zoo" / name, lazy=False)
    wanted = Denoising(count=8, steps=10, guidance=2.0, batch=8, prompts=() if name.endswith("dit") else ("boot", "bag", "shirt", "dress"))
    calibration, held_out = split(network, wanted, 0)
    judge = OutputJudge(network, held_out)
    settings = {"calibration": "8 images in 10 steps, guidance 2", "held out": "as many of other noise"}
    return Subject(network, calibration.calls, "error of the output", lambda copy: float(judge.measure(copy)["error"]), settings)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "fashion-judge": classifier,
    "fashion-unet": partial(denoiser, "fashion-unet"),
    "fashion-dit": partial(denoiser, "fashion-dit"),
}


def run(model: str, budgets: Sequence[str], full: bool, minutes: float, threads: int) -> Path:
    """Measure the cells of a model's table that are missing, until the time is over; returns the file."""
    start, subject = time.perf_counter(), SUBJECTS[model]()
    prunable = {budget: _prunable(subject.network, Budget.of(budget)) for budget in budgets}
    used = [budget for budget in budgets if prunable[budget] is not None]
    table = Table(model, subject, used, threads)
    for row in rows(full):
        for budget in used:
            layers, asked = prunable[budget], Budget.of(budget)
            assert layers is not None, "others are not used"
            steps = row.steps(asked, layers)
            if not steps or table.has(row, budget):
                continue
            if time.perf_counter() - start > 60 * minutes:
                print(f"stopped after {minutes:g} minutes; run it again for the rest")
                return table.path
            began, copy = time.perf_counter(), copy_of(subject.network)
            aerogel.compress(copy, {"name": "case", "steps": steps}, samples=subject.calls, measures=[])
            seconds = time.perf_counter() - began
            table.put(row, budget, subject.measure(copy), layers.mean(layers.zeros(copy)), seconds)
    return table.path


def _prunable(network: Network, budget: Budget) -> Prunable | None:
    """The layers that are pruned; None where a pattern does not fit all of them, so that its share would be of other weights."""
    whole = Prunable.of(network, 1)
    if budget.run == 1:
        return whole
    try:
        found = Prunable.of(network, budget.run)
    except aerogel.AerogelError:
        return None
    return found if set(found.layers) == set(whole.layers) else None


class Table:
    """The file of a model: a line for each row of methods, a column for each budget."""

    def __init__(self, model: str, subject: Subject, budgets: Sequence[str], threads: int) -> None:
        self.path = FOLDER / f"sparsity_{model.replace('-', '_')}.json"
        self._model, self._figure, self._budgets = model, subject.figure, list(budgets)
        self._settings = {**subject.settings, "seed": 0, "dtype": "float32", "threads": threads}
        before: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = before.get("settings") == self._settings and before.get("columns", [])[3:-1] == self._budgets
        self._rows: list[list[Any]] = before["rows"] if same else []

    def _find(self, row: Row) -> list[Any] | None:
        return next((one for one in self._rows if one[:3] == row.cells), None)

    def has(self, row: Row, budget: str) -> bool:
        """Return True where a cell was measured."""
        found = self._find(row)
        return found is not None and found[3 + self._budgets.index(budget)] is not None

    def put(self, row: Row, budget: str, value: float, zeros: float, seconds: float) -> None:
        """Write a cell, and the seconds of its compression into the last column."""
        print(*row.cells, budget, f"{value:.4f} zeros {zeros:.4f} {seconds:.1f} s", flush=True)
        found = self._find(row)
        if found is None:
            found = [*row.cells, *[None] * len(self._budgets), None]
            self._rows.append(found)
        found[3 + self._budgets.index(budget)] = value
        found[-1] = round(seconds, 1)
        better = "higher" if self._figure == "accuracy" else "lower"
        notes = [
            f"The {self._figure} at each share of zeros in the layers of the blocks; {better} is better. Layers around them are dense.",
            "Wanda and others that compare the weights of an output round their number down: up to 0.7 % fewer zeros.",
            "Seconds of one compression, the last one in the row, on a machine with other work: an order of magnitude, no comparison.",
        ]
        if not any(":" in one for one in self._budgets):
            notes.append("No pattern such as 2:4: it is of linear layers, and this model has convolutions.")
        title, columns = f"Zeros in zoo/{self._model}: {self._figure}", ["allocation", "criterion", "adjustment", *self._budgets, "seconds"]
        write(self.path.stem, title, self._settings, columns, self._rows, notes)
