"""GPTQ by Aerogel, driven like the rivals: same arguments, same files, a process of its own.

    .venv/bin/python benchmarks/rivals/aerogel_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8 --dtype float32]

`seconds` is the whole of aerogel.compress without measures: opening, quantizing, and saving too, which rivals are not charged for.
"""

from __future__ import annotations

import time

import torch
from driver import DTYPES, arguments, report, tokens_of

import aerogel
from aerogel.data import text


def main() -> None:
    given = arguments(__doc__)
    samples = text.calls(torch.from_numpy(tokens_of(given)), given.batch)
    recipe = {"name": "gptq", "steps": [{"gptq": {"scheme": f"W{given.bits}A16_G{given.group}"}}]}
    start = time.perf_counter()
    network = aerogel.load(given.model, dtype=DTYPES[given.dtype])
    aerogel.compress(network, recipe, output=given.output, samples=samples, measures=[])
    report(given, "aerogel", aerogel.__version__, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
