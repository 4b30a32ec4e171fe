"""How long the recipes for denoisers take at equal optimiser steps, and on what; writes benchmarks/results/diffusion_time.json.

python benchmarks/diffusion_time.py --steps 60
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusion_quality
import torch
from results import write

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.methods.diffusion import activation_ranges as ranges
from aerogel.methods.diffusion import brecq, tiar
from aerogel.model.calls import Call
from aerogel.training import fit as training

PUBLISHED = {"brecq": 20000, "activation_ranges": 5000, "tiar": 5000}
RECIPES = ("qdiffusion-w4a8", "tfmq-w4a8")
FITS = {"brecq": brecq, "activation_ranges": ranges, "tiar": tiar}


@contextmanager
def watched(seconds: Counter[str]) -> Iterator[None]:
    """Add up what each method's optimiser steps take, without the checks of a fit, whose number does not grow with its steps."""
    fits = {name: vars(module)["fit"] for name, module in FITS.items()}
    step, running = vars(training)["_step"], [""]

    def named(name: str, *args: Any, **kwargs: Any) -> Any:
        running[0] = name
        return fits[name](*args, **kwargs)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return step(*args, **kwargs)
        finally:
            seconds[running[0]] += time.perf_counter() - start  # type: ignore[assignment]

    vars(training)["_step"] = timed
    for name, module in FITS.items():
        vars(module)["fit"] = partial(named, name)
    try:
        yield
    finally:
        vars(training)["_step"] = step
        for name, module in FITS.items():
            vars(module)["fit"] = fits[name]


def run(recipe: str, module: torch.nn.Module, calls: list[Call], share: float) -> Counter[str]:
    """Seconds by what they were spent on."""
    used = {step.name for step in aerogel.Recipe.parse(recipe).steps}
    overrides = [f"{name}.steps={round(steps * share)}" for name, steps in PUBLISHED.items() if name in used]
    seconds: Counter[str] = Counter()
    start = time.perf_counter()
    with watched(seconds):
        aerogel.compress(copy.deepcopy(module), recipe, overrides=overrides, samples=calls, measures=())
    seconds["other"] = time.perf_counter() - start - sum(seconds.values())  # type: ignore[assignment]
    return seconds


def main() -> None:
    """Measure in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="Optimiser steps a block for weights; a quarter for ranges and the path.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipeline = diffusion_quality.pipeline_of("unet")
    wanted = Denoising(diffusion_quality.SHOWN, diffusion_quality.STEPS, diffusion_quality.GUIDANCE["unet"], diffusion_quality.CLASSES, 10)
    calls = record(pipeline, pipeline.unet, wanted)
    share = given.steps / PUBLISHED["brecq"]
    taken: dict[str, list[Counter[str]]] = {recipe: [] for recipe in RECIPES}
    for _ in range(given.rounds):
        for recipe in RECIPES:
            taken[recipe].append(run(recipe, pipeline.unet, calls, share))
            print(recipe, dict(taken[recipe][-1]), flush=True)
    rows = []
    for recipe in RECIPES:
        parts = {name: statistics.median(seconds[name] for seconds in taken[recipe]) for name in (*FITS, "other")}
        full = [sum(seconds[name] for name in FITS) / share + seconds["other"] for seconds in taken[recipe]]
        first = [sum(seconds[name] for name in FITS) / share + seconds["other"] for seconds in taken[RECIPES[0]]]
        rows.append(
            [recipe, *parts.values(), sum(parts.values()), statistics.median(full) / 3600,
             statistics.median(a / b for a, b in zip(full, first, strict=True))]
        )  # fmt: skip
    columns = [
        "recipe",
        "seconds in brecq",
        "in activation_ranges",
        "in tiar",
        "other",
        "total",
        "hours at the published steps",
        "times qdiffusion",
    ]
    settings = {
        "model": "fashion-unet", "calibration": f"{diffusion_quality.SHOWN} images, {diffusion_quality.STEPS} steps",
        "optimiser steps per block": given.steps, "batch": 32, "rounds": given.rounds, "threads": given.threads,
    }  # fmt: skip
    notes = [
        (
            "Published steps: 20,000 per block for weights, 5,000 for learned ranges or the temporal path. Here the same "
            "fraction of each is run."
        ),
        "Hours are extrapolated to the published steps for the optimisers; other time (passes over all samples, checks) is as measured.",
        "Target: at most half of qdiffusion. The published claim is 2.0x, without a statement of coverage.",
    ]
    print(write("diffusion_time", "Time to quantize a denoiser", settings, columns, rows, notes).read_text())


if __name__ == "__main__":
    main()
