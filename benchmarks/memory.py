"""Peak memory of compressing a checkpoint, over the interpreter's own, for two depths of one width: it should not grow with depth.

python benchmarks/memory.py                      # 2 GB and 4 GB of weights, about 12 GB of disk
python benchmarks/memory.py --width 1024         # a quarter of it, for development; nothing is written
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from results import FOLDER, write
from torch import Tensor

import aerogel
from aerogel.io.shards import write_shards
from aerogel.model.calls import Call

DEPTHS = (24, 48)
RECIPES = ("rtn-w4a16", "gptq-w4a16")
WIDTH, VOCABULARY, SHARD_BYTES = 2048, 8192, 500_000_000
SEQUENCES, LENGTH, BATCH, SEED = 16, 256, 4, 0


def config_of(blocks: int, width: int) -> transformers.LlamaConfig:
    """A Llama of 84 MB a block in bfloat16 when it is 2048 wide."""
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def make_checkpoint(folder: Path, config: transformers.LlamaConfig) -> int:
    """Write random weights without ever holding more than one tensor; returns their bytes."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in transformers.LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(SEED)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            yield name, value.bfloat16()

    config.save_pretrained(folder)
    write_shards(folder, tensors(), max_shard_size=SHARD_BYTES)
    return 2 * sum(shape.numel() for shape in shapes.values())


def status(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def compress_here(source: str, recipe: str, output: str) -> dict[str, Any]:
    """Compress in this process, which has done nothing but imports, and return its peak over them."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    calls = [Call((), {"input_ids": part, "use_cache": False, "logits_to_keep": 1}) for part in ids.split(BATCH)]
    _ = aerogel.compress, aerogel.Recipe.parse(recipe), transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    imports, start = status("VmRSS"), time.perf_counter()
    result = aerogel.compress(source, recipe, output=output, samples=calls, measures=())
    return {
        "imports": imports,
        "peak": status("VmHWM") - imports,
        "seconds": time.perf_counter() - start,
        "planned": result.facts["plan"]["peak_memory_bytes"],
    }


def compress_apart(source: Path, recipe: str, output: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--source", str(source), "--recipe", recipe, "--output", str(output)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def measure(width: int, depths: list[int], recipes: list[str], rounds: int) -> None:
    """Every depth and recipe: what the weights take, the median peak, what the plan said, the time, all peaks; sizes in MB."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for blocks in depths:
            source = Path(scratch, f"blocks-{blocks}")
            size = make_checkpoint(source, config_of(blocks, width))
            for recipe in recipes:
                found = [compress_apart(source, recipe, Path(scratch, f"{recipe}-{blocks}-{number}")) for number in range(rounds)]
                middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
                megabytes = [round(value / 1e6) for value in (size, middle["peak"], middle["planned"], middle["imports"])]
                peaks = ", ".join(str(round(one["peak"] / 1e6)) for one in found)
                rows.append([blocks, recipe, *megabytes, round(middle["seconds"]), peaks])
                print(rows[-1], flush=True)
                if width == WIDTH:
                    save(rows)


def main() -> None:
    """Measure all, or (as a child) one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=1)
    for option in ("--source", "--recipe", "--output"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.source:
        print(json.dumps(compress_here(given.source, given.recipe, given.output)))
        return
    measure(given.width, given.depths, given.recipes, given.rounds)


def save(rows: list[list[Any]]) -> None:
    """Put rows into the results, beside those of other recipes and depths."""
    path = FOLDER / "memory.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row[:2] not in [new[:2] for new in rows]]
    config = config_of(DEPTHS[0], WIDTH)
    settings = {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "vocabulary": VOCABULARY,
        "shards MB": SHARD_BYTES // 10**6,
        "calibration": f"{SEQUENCES} x {LENGTH} tokens in calls of {BATCH} sequences",
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }
    columns = [
        "blocks",
        "recipe",
        "weights MB",
        "peak MB above the interpreter",
        "planned MB",
        "interpreter MB",
        "seconds",
        "peaks of all rounds",
    ]
    notes = [
        "Target: at most 1200 MB above the interpreter (after all imports), and equal for both depths within 10 %.",
        f"Other depths than {DEPTHS[0]} and {DEPTHS[1]} are checkpoints of the same width, where a full run took too long.",
    ]
    write(
        "memory",
        "Peak memory of compressing random-weight Llama checkpoints",
        settings,
        columns,
        sorted(kept + rows, key=lambda row: (row[1], row[0])),
        notes,
    )


if __name__ == "__main__":
    main()
