"""Time and peak memory of compressing a checkpoint in the shape of Llama 3.2 1B (16 blocks, 2.5 GB in bfloat16), weights at random.

    python benchmarks/llama_1b.py                              # 128 samples of 512 tokens, gptq-w4a16; about 4 GB of disk
    python benchmarks/llama_1b.py --blocks 2 --samples 8       # for development; nothing is written

Only the seconds and the memory mean something: nothing is lost or kept by rounding noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import make_checkpoint, status
from results import write

import aerogel
from aerogel.data import text

BLOCKS, SAMPLES, LENGTH = 16, 128, 512
VOCABULARY, SEED, BATCH = 128_256, 0, 8
MARK = "result: "


def config_of(blocks: int) -> transformers.LlamaConfig:
    """The shape of Llama 3.2 1B, with fewer blocks if wanted."""
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def compress_here(source: str, output: str, recipe: str, samples: int, length: int) -> dict[str, Any]:
    """Compress in this process, without measuring what came out; returns seconds by stage and the peak over the imports."""
    tokens = torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(SEED))
    _ = aerogel.compress, aerogel.Recipe.parse(recipe), transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    imports, start = status("VmRSS"), time.perf_counter()
    result = aerogel.compress(source, recipe, output=output, samples=text.calls(tokens, BATCH), measures=())
    return {
        "seconds": time.perf_counter() - start,
        "stages": result.facts["timings"],
        "peak": status("VmHWM") - imports,
        "imports": imports,
        "planned": result.facts["plan"]["peak_memory_bytes"],
        "threads": torch.get_num_threads(),
    }


def compress_apart(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, with its own number of threads."""
    numbers = ("--samples", str(given.samples), "--length", str(given.length), "--recipe", given.recipe)
    command = [sys.executable, __file__, "--source", str(folder / "source"), "--output", str(folder / "output"), *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "GOMP_SPINCOUNT": "1000"}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(next(line for line in answer.splitlines() if line.startswith(MARK)).removeprefix(MARK))
    return found


def main() -> None:
    """Make the checkpoint, compress it and write down what that took; or (as a child) compress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"blocks": BLOCKS, "samples": SAMPLES, "length": LENGTH, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--source", help="Folder to compress in this process.")
    parser.add_argument("--output", help="Folder for what comes out of it.")
    given = parser.parse_args()
    if given.source:
        print(MARK + json.dumps(compress_here(given.source, given.output, given.recipe, given.samples, given.length)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = make_checkpoint(Path(scratch, "source"), config_of(given.blocks))
        found = compress_apart(Path(scratch), given)
    print(json.dumps({"bytes": size, **found}, indent=1))
    if (given.blocks, given.samples, given.length) == (BLOCKS, SAMPLES, LENGTH):
        gigabytes = [round(value / 1e9, 2) for value in (size, found["peak"], found["planned"], found["imports"])]
        write(
            "llama_1b",
            "Compressing a checkpoint in the shape of Llama 3.2 1B",
            {name: vars(given)[name] for name in ("blocks", "samples", "length")} | {"threads": found["threads"], "weights": "random"},
            ["recipe", "weights GB", "peak GB over imports", "planned GB", "imports GB", "seconds", "minutes"],
            [[given.recipe, *gigabytes, round(found["seconds"]), round(found["seconds"] / 60, 1)]],
            [
                "From opening the folder to the saved output, without measures.",
                "Target: gptq-w4a16 in at most 40 minutes on two idle cores.",
            ],
        )


if __name__ == "__main__":
    main()
