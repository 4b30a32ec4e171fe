"""What the drivers have in common: their arguments, the tokens, and the file that says how long it took.

Each driver runs in the environment of its library, so only what all of these have is imported here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments(about: str | None) -> argparse.Namespace:
    """MODEL, TOKENS and OUTPUT, and the settings that have to be the same for all."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "output"):
        parser.add_argument(name, type=Path)
    for name, default in {"bits": 4, "group": 64, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.5, help="Of SparseGPT: the share of zeros.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="What is computed in.")
    return parser.parse_args()


def tokens_of(given: argparse.Namespace) -> np.ndarray:
    """The sequences to calibrate on (samples, length)."""
    return np.load(given.tokens).astype(np.int64)


def report(given: argparse.Namespace, rival: str, version: str, **seconds: float) -> None:
    """Write seconds.json into the output folder: `seconds` is the one that counts."""
    facts: dict[str, Any] = {
        "rival": rival,
        "version": version,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bits": given.bits,
        "group": given.group,
        "batch": given.batch,
        "dtype": given.dtype,
        "tokens": list(tokens_of(given).shape),
        **seconds,
        "peak_bytes": _peak(),
    }
    (given.output / "seconds.json").write_text(json.dumps(facts, indent=1) + "\n")


def _peak() -> int:
    """The most memory that this process had resident; ru_maxrss would start with what its parent had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
