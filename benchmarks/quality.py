"""What each method loses at 4, 3 and 2 bits on SmolLM2-135M, with the same calibration tokens for all.

The model's published weights lie on a 4-bit grid, which 4-bit rounding can hit for free. So 4 bits are judged on a rotated copy:
the same function with ordinary weights. 3 and 2 bits are judged on both.

    python benchmarks/quality.py [--samples 128] [--length 512] [--weights "as published" rotated] [--schemes W4A16_G64 ...]

Rows are put beside those that are there already, so that parts can run at different times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, write

import aerogel
from aerogel.engine.calibration import Samples
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.perplexity import Perplexity
from aerogel.io import save
from aerogel.methods.quantization.rotate import Rotate

CASES = [
    ("rotated", "W4A16_G64"),
    ("as published", "W4A16_G64"),
    ("rotated", "W3A16_G64"),
    ("as published", "W3A16_G64"),
    ("as published", "W2A16_G64"),
]
ORDER = [("as published", "float"), ("as published", "W8A8"), *CASES]
METHODS = ("rtn", "gptq", "awq")
EIGHT_BITS = ("rtn-w8a8", "smoothquant-w8a8")
"""Recipes of W8A8 with dynamic inputs."""
PERPLEXITY = Perplexity(tokens=16384, stride=1023)
AGREEMENT = KlDivergence(tokens=4096, stride=1023)
COLUMNS = ["weights", "scheme", "method", "perplexity", "nats lost", "relative to RTN loss", "KL", "top-1"]
NOTES = [
    (
        "Targets for W4 on the rotated copy and W3 on both: GPTQ loses at most 60 % and AWQ at most 85 % of the RTN "
        "loss; at W2 the same order."
    ),
    "Target for W8A8 with dynamic inputs: perplexity at most 1 % above the original, which is 0.01 nats.",
    "RTN ranges cover every weight (`observer: minmax`).",
]


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


class Bench:
    """The original, what it scores, and the table so far."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.original = aerogel.load("smollm2-135m", lazy=False)
        self.base = PERPLEXITY.measure(self.original)
        self.keep(["as published", "float", "", self.base["perplexity"], 0.0, None, None, None])

    def add(self, copy: str, scheme: str, method: str, source: str | Path, recipe: str | dict[str, Any], by_rtn: float | None) -> float:
        """Compress, reopen what was saved, measure it and put it into the table; returns the nats lost."""
        with tempfile.TemporaryDirectory() as scratch:
            aerogel.compress(source, recipe, output=Path(scratch) / "out", samples=self.samples, measures=[])
            network = aerogel.load(Path(scratch) / "out", lazy=False)
            scores, agreement = PERPLEXITY.measure(network), AGREEMENT.measure(network, against=self.original)
        lost = scores["nats_per_token"] - self.base["nats_per_token"]
        share = lost / by_rtn if by_rtn is not None else None
        self.keep([copy, scheme, method, scores["perplexity"], lost, share, agreement["kl"], agreement["top1"]])
        return lost

    def keep(self, row: list[Any]) -> None:
        """Write a row into the table, beside those measured with the same text."""
        print(*row, flush=True)
        settings = {
            "samples": self.samples.count,
            "length": self.samples.length,
            "calibration": "State of the Union 1950-1999",
            "held out": self.base["source"],
            "scored tokens": self.base["tokens"],
        }
        path = FOLDER / "quality.json"
        before = json.loads(path.read_text()) if path.exists() else {"rows": [], "settings": settings}
        kept = [old for old in before["rows"] if old[:3] != row[:3]] if before["settings"] == settings else []
        rows = sorted([*kept, row], key=lambda row: ORDER.index((row[0], row[1])))
        write("quality", "Quality of quantization, SmolLM2-135M-Instruct", settings, COLUMNS, rows, NOTES)


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--weights", nargs="+", default=["as published", "rotated"])
    parser.add_argument("--schemes", nargs="+", default=list(dict.fromkeys(scheme for _, scheme in ORDER)))
    given = parser.parse_args()
    bench = Bench(Samples("sotu", given.samples, given.length))
    if "W8A8" in given.schemes and "as published" in given.weights:
        for recipe in EIGHT_BITS:
            bench.add("as published", "W8A8", recipe, "smollm2-135m", recipe, None)
    with tempfile.TemporaryDirectory() as scratch:
        sources: dict[str, str | Path] = {"as published": "smollm2-135m"}
        if "rotated" in given.weights:
            sources["rotated"] = rotated_copy(Path(scratch) / "rotated")
        for copy, scheme in CASES:
            if copy in given.weights and scheme in given.schemes:
                by_rtn = None
                for method in METHODS:
                    recipe = {"name": f"{method}-{scheme.lower()}", "steps": [{method: {"scheme": scheme}}]}
                    lost = bench.add(copy, scheme, method, sources[copy], recipe, by_rtn)
                    by_rtn = lost if by_rtn is None else by_rtn


if __name__ == "__main__":
    main()
