"""What bit masks save of the size of folders; writes benchmarks/results/bitmask.json.

python benchmarks/bitmask.py [wanda-50] [sparsegpt-50] [magnitude-50-rtn-w4a16]

Rows stand beside those that are there already, so that recipes can be measured at different times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, write

import aerogel
from aerogel.engine import exporting
from aerogel.engine.calibration import Samples
from aerogel.io.checkpoint import Checkpoint
from aerogel.numerics.packing import raw_bytes

MODEL = "smollm2-135m"
RECIPES: dict[str, Any] = {
    "wanda-50": "wanda-50",
    "sparsegpt-50": "sparsegpt-50",
    "magnitude-50-rtn-w4a16": {"steps": [{"magnitude": {"sparsity": 0.5}}, {"rtn": {"scheme": "W4A16_G64"}}]},
}
COLUMNS = ["recipe", "pruned weights, MB", "as bit masks, MB", "share", "weight files, MB", "as bit masks, MB ", "share ", "export, s"]


def measured(recipe: str, folder: Path) -> list[Any]:
    """Compress, store in bfloat16, export, compare sizes, and open both."""
    dense, masked = folder / "dense", folder / "masked"
    network = aerogel.load(MODEL, lazy=False, dtype=torch.float32)
    network.stored_dtype = torch.bfloat16
    aerogel.compress(network, RECIPES[recipe], samples=Samples("sotu", 8, 256), output=dense, measures=[])
    start = time.perf_counter()
    exporting.export(dense, "bitmask", masked)
    seconds = time.perf_counter() - start
    told = json.loads((masked / "config.json").read_text())["quantization_config"]["sparsity_config"]["tensors"]
    before, after = Checkpoint.open(dense), Checkpoint.open(masked)
    pruned = before.bytes(told)
    stored = sum(after.bytes([name, f"{name}_bitmask"]) for name in told)
    same(dense, masked)
    return [recipe, pruned / 1e6, stored / 1e6, stored / pruned, size(dense) / 1e6, size(masked) / 1e6, size(masked) / size(dense), seconds]


def same(one: Path, other: Path) -> None:
    """Check that two folders open as the same model, bit for bit."""
    mine, theirs = (aerogel.load(folder, lazy=False).module.state_dict() for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(raw_bytes(tensor), raw_bytes(theirs[name])) for name, tensor in mine.items())


def size(folder: Path) -> int:
    """Bytes of all files of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def keep(row: list[Any]) -> None:
    """Write a row into the table, beside those of other recipes."""
    print(*row, flush=True)
    path = FOLDER / "bitmask.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([*(old for old in rows if old[0] != row[0]), row], key=lambda one: list(RECIPES).index(one[0]))
    notes = [
        "Pruned weights: the tensors that are stored as bit masks, of linear layers in blocks. Embeddings, scales and norms stay.",
        "Both folders open as the same model, bit for bit. Seconds on a busy machine.",
    ]
    write(path.stem, "SmolLM2-135M as bit masks", {"dtype": "bfloat16, or 4-bit integer codes"}, COLUMNS, rows, notes)


def main() -> None:
    """Measure the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="Recipes to measure; all by default.")
    for recipe in parser.parse_args().recipes:
        with tempfile.TemporaryDirectory() as folder:
            keep(measured(recipe, Path(folder)))


if __name__ == "__main__":
    main()
