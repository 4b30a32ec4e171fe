"""SparseGPT of all of SmolLM2-135M by Aerogel and llm-compressor, and GPTQ by Aerogel: wall-clock and what it cost, in one interleaved run.

    python benchmarks/sparsegpt_rivals.py [--samples 64] [--length 512] [--rounds 3] [--held-out 48] [--dtypes float32 bfloat16]

The fastest dtype of a library is what counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write
from rivals import nats, opened, run

import aerogel
from aerogel.data import text

RUNS = {
    ("aerogel", "sparsegpt"): "Aerogel, SparseGPT",
    ("aerogel", "gptq"): "Aerogel, GPTQ",
    ("llmcompressor", "sparsegpt"): "llm-compressor, SparseGPT",
}
Key = tuple[str, str, str]
"""Library, method and dtype."""
SPARSITY = 0.5
COLUMNS = ["library and method", "computed in", "seconds", "Aerogel's SparseGPT takes", "zeros", "perplexity", "nats lost"]


def main() -> None:
    """Compress with each in turn, round after round, then measure every folder with the same code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"samples": 64, "length": 512, "rounds": 3, "held-out": 48, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    network = aerogel.load("smollm2-135m")
    held_out = text.samples(network.processor, "sotu-held-out", given.held_out, given.length).numpy()
    original = nats(opened(network.origin), held_out)
    runs = {(*key, dtype): list[dict[str, Any]]() for dtype in given.dtypes for key in RUNS}
    judged: dict[Key, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = folder / "tokens.npy"
        np.save(tokens, text.samples(network.processor, "sotu", given.samples, given.length).numpy())
        for number in range(given.rounds):
            for (name, method, dtype), found in runs.items():
                output, options = folder / f"{name}-{method}-{dtype}-{number}", ("--dtype", dtype, "--sparsity", str(SPARSITY))
                found.append(run(name, network.origin, tokens, output, *options, threads=given.threads, method=method))
                print(name, method, dtype, round(found[-1]["seconds"], 1), "s", flush=True)
        for name, method, dtype in runs:
            # Packed integer codes are not opened here; that GPTQ is as good as elsewhere has a table of its own.
            if method == "sparsegpt":
                model = opened(folder / f"{name}-{method}-{dtype}-0")
                judged[name, method, dtype] = nats(model, held_out), zeros(model)
    table = rows(runs, judged, original)
    notes = [
        "The seconds of Aerogel include opening and saving; those of llm-compressor are the pruning alone.",
        "The relative time uses the fastest run of Aerogel's SparseGPT.",
        "Targets: at most 1.2 times Aerogel's GPTQ and half of llm-compressor's SparseGPT, loss not worse.",
    ]
    settings = {**vars(given), "zeros asked for": SPARSITY, "gptq": "W4 g64 symmetric", "weights": "as published"}
    write("sparsegpt_rivals", "SparseGPT of a complete model, compared with another library", settings, COLUMNS, table, notes)


def zeros(model: torch.nn.Module) -> float:
    """Return the share of zeros in the linear layers of the blocks."""
    weights = [part.weight for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and "lm_head" not in name]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def rows(
    runs: dict[tuple[str, str, str], list[dict[str, Any]]], judged: dict[Any, tuple[float, float]], original: float
) -> list[list[Any]]:
    """Return a row for every library, method and dtype."""
    seconds = {key: statistics.median(found["seconds"] for found in many) for key, many in runs.items()}
    ours = min(taken for (name, method, _), taken in seconds.items() if (name, method) == ("aerogel", "sparsegpt"))
    table: list[list[Any]] = [["float", "float32", None, None, 0.0, math.exp(original), 0.0]]
    for (name, method, dtype), many in runs.items():
        own = (name, method) == ("aerogel", "sparsegpt")
        loss, share = judged.get((name, method, dtype), (None, None))
        quality = [None, None, None] if loss is None else [share, math.exp(loss), loss - original]
        label = RUNS[name, method].replace(",", f" {many[0]['version']},")
        taken = seconds[name, method, dtype]
        table.append([label, dtype, taken, None if own else ours / taken, *quality])
    return table


if __name__ == "__main__":
    main()
