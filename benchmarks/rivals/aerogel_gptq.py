"""GPTQ by Aerogel, driven like the rivals: same arguments, same files, a process of its own.

    .venv/bin/python benchmarks/rivals/aerogel_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8]

`seconds` is the whole of aerogel.compress without measures: opening, quantizing, and saving too, which rivals are not charged for.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

import aerogel
from aerogel.data import text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    tokens_NT = torch.from_numpy(np.load(given.tokens).astype(np.int64))
    recipe = {"name": "gptq", "steps": [{"gptq": {"scheme": f"W{given.bits}A16_G{given.group}"}}]}
    start = time.perf_counter()
    aerogel.compress(given.model, recipe, output=given.output, samples=text.calls(tokens_NT, given.batch), measures=[])
    seconds = time.perf_counter() - start
    about = {"rival": "aerogel", "version": aerogel.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {"bits": given.bits, "group": given.group, "batch": given.batch, "tokens": list(tokens_NT.shape)}
    memory = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    (given.output / "seconds.json").write_text(json.dumps({**about, **settings, "seconds": seconds, **memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
