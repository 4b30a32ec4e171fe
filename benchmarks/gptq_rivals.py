"""GPTQ of all of SmolLM2-135M by Aerogel, llm-compressor and GPTQModel: wall-clock, memory and what it cost, in one interleaved run.

python benchmarks/gptq_rivals.py [--samples 128] [--length 512] [--rounds 1] [--held-out 48]
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
from rivals import RIVALS, nats, opened, run

import aerogel
from aerogel.data import text

NAMES = {"aerogel": "Aerogel", "llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel"}


def main() -> None:
    """Quantize with each in turn, round after round, then measure every folder with the same code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"samples": 128, "length": 512, "rounds": 1, "held-out": 48, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    network = aerogel.load("smollm2-135m")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = folder / "tokens.npy"
        np.save(tokens, text.samples(network.processor, "sotu", given.samples, given.length).numpy())
        held_out = text.samples(network.processor, "sotu-held-out", given.held_out, given.length).numpy()
        assert set(NAMES) == set(RIVALS)
        for number in range(given.rounds):
            for name in NAMES:
                runs[name].append(run(name, network.origin, tokens, folder / f"{name}-{number}", threads=given.threads))
                print(name, round(runs[name][-1]["seconds"], 1), "s", flush=True)
        losses = {name: nats(opened(folder / f"{name}-0"), held_out) for name in NAMES}
        original = nats(opened(network.origin), held_out)
    seconds = {name: statistics.median(found["seconds"] for found in many) for name, many in runs.items()}
    rows: list[list[Any]] = [["float", None, None, None, math.exp(original), 0.0]]
    for name, called in NAMES.items():
        first = runs[name][0]
        peak = f"{max(found['peak_bytes'] for found in runs[name]) / 1e9:.2f}"
        label = f"{called} {first['version']}"
        rows.append([label, seconds[name], seconds[name] / seconds["aerogel"], peak, math.exp(losses[name]), losses[name] - original])
    columns = ["GPTQ W4 g64 symmetric", "seconds", "times Aerogel's", "peak GB", "perplexity", "nats lost"]
    settings = {**vars(given), "weights": "as published", "float": "float32", "torch threads here": torch.get_num_threads()}
    notes = [
        "Aerogel's seconds include opening and saving; the rivals' are the quantization alone.",
        "Targets: at most half of llm-compressor's time, below GPTQModel's, perplexity not worse by more than 0.5 %.",
    ]
    write("gptq_rivals", "GPTQ of a whole model beside other libraries", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
