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
from aerogel import catalog
from aerogel.evaluate.agreement import Agreement
from aerogel.evaluate.perplexity import Perplexity

CASES = [
    ("rotated", "W4A16_G64"),
    ("as published", "W4A16_G64"),
    ("rotated", "W3A16_G64"),
    ("as published", "W3A16_G64"),
    ("as published", "W2A16_G64"),
]
METHODS = ("rtn", "gptq", "awq")
TARGETS = {"gptq": 0.60, "awq": 0.85}


def rotated_copy(folder: Path) -> Path:
    """A copy of the model turned by a random orthogonal matrix folded through the residual stream."""
    aerogel.compress("smollm2-135m", {"name": "rotated-copy", "steps": [{"rotate": {"kind": "random"}}]}, output=folder)
    return folder


def measured(source: str | Path, recipe: dict[str, Any], original: Any, folder: Path, calibration: dict[str, int]) -> dict[str, float]:
    """Compress, reopen what was saved, and measure it."""
    start = time.perf_counter()
    aerogel.compress(source, recipe, output=folder, samples=calibration["samples"], length=calibration["length"])
    seconds = time.perf_counter() - start
    network = aerogel.load(folder)
    perplexity = Perplexity().measure(network)
    agreement = Agreement().measure(network, against=original)
    return {"nats": perplexity["nats_per_token"], "ppl": perplexity["perplexity"], "kl": agreement["kl"], "top1": agreement["top1"], "s": seconds}


def main() -> None:
    """Run every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    calibration = vars(parser.parse_args())
    original = aerogel.load("smollm2-135m")
    base = Perplexity().measure(original)
    rows: list[list[Any]] = [["as published", "float", "", base["perplexity"], 0.0, None, None, None, None]]
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"as published": "smollm2-135m", "rotated": rotated_copy(Path(scratch) / "rotated")}
        for number, (copy, scheme) in enumerate([*CASES, ("as published", "W8A8")]):
            lost_by_rtn = math.nan
            for method in METHODS if scheme != "W8A8" else ("rtn",):
                recipe = {"name": f"{method}-{scheme.lower()}", "steps": [{method: {"scheme": scheme}}]}
                facts = measured(sources[copy], recipe, original, Path(scratch) / f"{number}-{method}", calibration)
                lost = facts["nats"] - base["nats_per_token"]
                lost_by_rtn = lost if method == "rtn" else lost_by_rtn
                share = lost / lost_by_rtn if method != "rtn" else None
                rows.append([copy, scheme, method, facts["ppl"], lost, share, facts["kl"], facts["top1"], facts["s"]])
                print(*rows[-1], flush=True)
    settings = {**calibration, "calibration": "State of the Union 1950-1999", "held out": base["source"], "tokens": base["tokens"]}
    columns = ["weights", "scheme", "method", "perplexity", "nats lost", "share of RTN's loss", "KL", "top-1", "seconds"]
    notes = [f"Target: {name} loses at most {limit:.0%} of what RTN loses." for name, limit in TARGETS.items()]
    settings |= {"threads": torch.get_num_threads(), "methods of the catalog": len(catalog.names("methods"))}
    write("quality", "Quality of weight-only quantization, SmolLM2-135M-Instruct", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
