"""GPTQ of all of SmolLM2-135M by one process of two threads and by two processes of one thread, in one interleaved run.

    python benchmarks/processes.py [--samples 64] [--length 256] [--rounds 3]

Each run is a command of its own, as users start it. Two processes exchange what they have through gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import write

from aerogel.engine.calibration import TOKENS_OF_A_CALL
from aerogel.engine.opening import open_model
from aerogel.layers.linear import QuantLinear

MODEL, RECIPE = "smollm2-135m", "gptq-w4a16"
LAUNCHERS = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
"""How so many processes are started."""
CORES = 2


def main() -> None:
    """Compress with each in turn, round after round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"samples": 64, "length": 256, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dry", action="store_true", help="write no results")
    given = parser.parse_args()
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in LAUNCHERS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(given.rounds):
            for count in found:
                found[count].append(compressed(Path(scratch, f"{count}-{number}"), count, given.samples, given.length))
                print(count, found[count][-1], flush=True)
        differing = share_of_other_weights(Path(scratch, "1-0"), Path(scratch, "2-0"))
    made = rows(found, differing)
    print(*made, sep="\n")
    if not given.dry:
        save(made, {"model": MODEL, "recipe": RECIPE, "samples": given.samples, "length": given.length, "rounds": given.rounds})


def compressed(output: Path, processes: int, samples: int, length: int) -> dict[str, Any]:
    """Run the command; returns its seconds, those of the compression alone, and the peak of its largest process."""
    command = ["compress", MODEL, "--recipe", RECIPE, "--output", str(output), "--samples", str(samples), "--length", str(length)]
    command += ["--batch-size", str(max(1, min(TOKENS_OF_A_CALL // length, samples // max(LAUNCHERS))))]  # the same calls for both
    threads = str(CORES // processes)
    start = time.perf_counter()
    started = subprocess.Popen(
        [*LAUNCHERS[processes], "-m", "aerogel", *command, "--threads", threads, "--no-evaluate", "--quiet"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    _, status, usage = os.wait4(started.pid, 0)  # of the command and of all processes that it started and waited for
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"the command with {processes} processes failed")
    peak = usage.ru_maxrss * 1024
    return {"seconds": seconds, "compress": json.loads((output / "aerogel.json").read_text())["timings"]["compress"], "peak": peak}


def share_of_other_weights(one: Path, two: Path) -> float:
    """Return the share of quantized weights that differ between two folders."""
    networks = [open_model(folder, lazy=False).module for folder in (one, two)]
    pairs = [
        (part.dequantized(torch.float32), networks[1].get_submodule(name).dequantized(torch.float32))  # type: ignore[operator]
        for name, part in networks[0].named_modules()
        if isinstance(part, QuantLinear)
    ]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def rows(found: dict[int, list[dict[str, Any]]], differing: float) -> list[list[Any]]:
    """The table: seconds are medians over the rounds."""
    middle = {count: {key: statistics.median(one[key] for one in many) for key in many[0]} for count, many in found.items()}
    return [
        [
            f"{count} x {CORES // count}",
            values["compress"],
            values["compress"] / middle[1]["compress"],
            values["seconds"],
            round(max(one["peak"] for one in found[count]) / 1e6),
            None if count == 1 else f"{100 * differing:.2f} %",
            ", ".join(f"{one['compress']:.0f}" for one in found[count]),
        ]
        for count, values in middle.items()
    ]


def save(made: list[list[Any]], settings: dict[str, Any]) -> None:
    """Write the results."""
    write(
        "processes",
        "GPTQ of a complete model by one process and by two that share the calibration",
        settings,
        [
            "processes x threads",
            "seconds of compression",
            "relative to one process",
            "seconds of the command",
            "peak MB of a process",
            "weights that differ",
            "seconds of all rounds",
        ],
        made,
        [
            "Commands run in turn. Both use two CPU threads in all; two processes exchange through gloo on one machine.",
            (
                "Both have the same calls. Weights differ because two threads add in another order; with as many threads a process, "
                "two give one's bits (tests/engine/test_processes.py)."
            ),
            "The peak is of the largest process.",
        ],
    )


if __name__ == "__main__":
    main()
