"""GPTQ by Aerogel, driven like the rivals: same arguments, same files, a process of its own.

    .venv/bin/python benchmarks/rivals/aerogel_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8 --dtype float32]

`seconds` is the whole of aerogel.compress without measures: opening, quantizing, and saving too, which rivals are not charged for.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from driver import DTYPES, arguments, report, tokens_of

import aerogel
from aerogel.data import text


def compress(given: argparse.Namespace, step: dict[str, Any]) -> None:
    """Compress with a recipe of one step, and write the time."""
    samples = text.calls(torch.from_numpy(tokens_of(given)), given.batch)
    start = time.perf_counter()
    network = aerogel.load(given.model, dtype=DTYPES[given.dtype])
    aerogel.compress(network, {"steps": [step]}, output=given.output, samples=samples, measures=[])
    report(given, "aerogel", aerogel.__version__, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    asked = arguments(__doc__)
    compress(asked, {"gptq": {"scheme": f"W{asked.bits}A16_G{asked.group}"}})
