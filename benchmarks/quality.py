"""What each method loses at 4, 3 and 2 bits on SmolLM2-135M, with the same calibration tokens for all.

The model's published weights lie on a 4-bit grid, which 4-bit rounding can hit for free. So 4 bits are judged on a rotated copy:
the same function with ordinary weights. 3 and 2 bits are judged on both.

    python benchmarks/quality.py [--samples 128] [--length 512]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import write

import aerogel
from aerogel.engine.calibration import Samples
from aerogel.evaluate.agreement import Agreement
from aerogel.evaluate.perplexity import Perplexity
from aerogel.methods.quantization.rotate import Rotate
from aerogel.model import save

CASES = [
    ("rotated", "W4A16_G64"),
    ("as published", "W4A16_G64"),
    ("rotated", "W3A16_G64"),
    ("as published", "W3A16_G64"),
    ("as published", "W2A16_G64"),
]
METHODS = ("rtn", "gptq", "awq")
PERPLEXITY = Perplexity(tokens=16384, stride=1023)
AGREEMENT = Agreement(tokens=4096, stride=1023)
TARGETS = {"gptq": 0.60, "awq": 0.85}


def rotated_copy(folder: Path) -> Path:
    """A copy of the model turned by a random orthogonal matrix folded through the residual stream.

    It is kept in float32, because rounding turned weights to 16 bits already costs as much as 8-bit quantization does.
    """
    network = aerogel.load("smollm2-135m", lazy=False)
    Rotate(kind="random").apply(network, [])
    network.stored_dtype = torch.float32
    with save.new_folder(folder) as new:
        save.write(network, new)
    return folder


def measured(source: str | Path, recipe: dict[str, Any], original: Any, folder: Path, samples: Samples) -> dict[str, float]:
    """Compress, reopen what was saved, and measure it."""
    start = time.perf_counter()
    aerogel.compress(source, recipe, output=folder, samples=samples, measures=[])
    seconds = time.perf_counter() - start
    network = aerogel.load(folder, lazy=False)
    return {**PERPLEXITY.measure(network), **AGREEMENT.measure(network, against=original), "seconds": seconds}


def main() -> None:
    """Run every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    samples = Samples("sotu", given.samples, given.length)
    original = aerogel.load("smollm2-135m", lazy=False)
    base = PERPLEXITY.measure(original)
    rows: list[list[Any]] = [["as published", "float", "", base["perplexity"], 0.0, None, None, None, None]]
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"as published": "smollm2-135m", "rotated": rotated_copy(Path(scratch) / "rotated")}
        for number, (copy, scheme) in enumerate([*CASES, ("as published", "W8A8")]):
            lost_by_rtn = math.nan
            for method in METHODS if scheme != "W8A8" else ("rtn",):
                recipe = {"name": f"{method}-{scheme.lower()}", "steps": [{method: {"scheme": scheme}}]}
                facts = measured(sources[copy], recipe, original, Path(scratch) / f"{number}-{method}", samples)
                lost = facts["nats_per_token"] - base["nats_per_token"]
                lost_by_rtn = lost if method == "rtn" else lost_by_rtn
                share = lost / lost_by_rtn if method != "rtn" else None
                rows.append([copy, scheme, method, facts["perplexity"], lost, share, facts["kl"], facts["top1"], facts["seconds"]])
                print(*rows[-1], flush=True)
    settings = {
        **vars(given),
        "calibration": "State of the Union 1950-1999",
        "held out": base["source"],
        "scored tokens": base["tokens"],
        "threads": torch.get_num_threads(),
    }
    columns = ["weights", "scheme", "method", "perplexity", "nats lost", "share of RTN's loss", "KL", "top-1", "seconds"]
    notes = [f"Target: {name} loses at most {limit:.0%} of what RTN loses." for name, limit in TARGETS.items()]
    write("quality", "Quality of weight-only quantization, SmolLM2-135M-Instruct", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
