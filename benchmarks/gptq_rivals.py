"""GPTQ of all of SmolLM2-135M by Aerogel, llm-compressor and GPTQModel: wall-clock, memory and what it cost, in one interleaved run.

    python benchmarks/gptq_rivals.py [--samples 128 64] [--length 512] [--rounds 1] [--held-out 48] [--dtypes float32 bfloat16]

Each runs in every dtype, because which is faster depends on the processor; the fastest of a library is what counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import write
from rivals import RIVALS, nats, opened, run

import aerogel
from aerogel.data import text

Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""(library, dtype) -> its runs."""
NAMES = {"aerogel": "Aerogel", "llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel"}


def main() -> None:
    """Quantize with each in turn, round after round, then measure every folder with the same code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"length": 512, "rounds": 1, "held-out": 48, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    network = aerogel.load("smollm2-135m")
    held_out = text.samples(network.processor, "sotu-held-out", given.held_out, given.length).numpy()
    original = nats(opened(network.origin), held_out)
    assert set(NAMES) == set(RIVALS)
    table: list[list[Any]] = [["float", "float32", None, None, None, None, math.exp(original), 0.0]]
    for samples in given.samples:
        runs: Runs = {(name, dtype): [] for dtype in given.dtypes for name in NAMES}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            tokens = folder / "tokens.npy"
            np.save(tokens, text.samples(network.processor, "sotu", samples, given.length).numpy())
            for number in range(given.rounds):
                for (name, dtype), found in runs.items():
                    output = folder / f"{name}-{dtype}-{number}"
                    found.append(run(name, network.origin, tokens, output, "--dtype", dtype, threads=given.threads))
                    print(samples, name, dtype, round(found[-1]["seconds"], 1), "s", flush=True)
            losses = {(name, dtype): nats(opened(folder / f"{name}-{dtype}-0"), held_out) for name, dtype in runs}
        table += rows(samples, runs, losses, original)
    write(
        "gptq_rivals",
        "GPTQ of a complete model, compared with other libraries",
        {**vars(given), "weights": "as published"},
        [
            "GPTQ W4 g64 symmetric",
            "computed in",
            "sequences",
            "seconds",
            "Aerogel time relative to it",
            "peak GB",
            "perplexity",
            "nats lost",
        ],
        table,
        [
            (
                "The seconds of Aerogel include opening and saving; those of the other libraries are the quantization alone. "
                "The relative time uses the fastest run of Aerogel."
            ),
            "Targets: at most 0.3 of llm-compressor's time and 0.35 of GPTQModel's, perplexity not worse.",
        ],
    )


def rows(samples: int, runs: Runs, losses: dict[tuple[str, str], float], original: float) -> list[list[Any]]:
    """Every library in every dtype, with one number of calibration sequences."""
    seconds = {key: statistics.median(found["seconds"] for found in many) for key, many in runs.items()}
    ours = min(taken for (name, _), taken in seconds.items() if name == "aerogel")
    made: list[list[Any]] = []
    for (name, dtype), many in runs.items():
        taken = seconds[name, dtype]
        peak = f"{max(found['peak_bytes'] for found in many) / 1e9:.2f}"
        label, lost = f"{NAMES[name]} {many[0]['version']}", losses[name, dtype]
        share = None if name == "aerogel" else ours / taken
        made.append([label, dtype, samples, taken, share, peak, math.exp(lost), lost - original])
    return made


if __name__ == "__main__":
    main()
