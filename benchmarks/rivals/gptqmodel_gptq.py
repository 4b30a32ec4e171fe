"""GPTQ by GPTQModel, in its own environment.

    .envs/gptqmodel/bin/python benchmarks/rivals/gptqmodel_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8]

MODEL is a Hugging Face folder; TOKENS an integer array (samples, length) in .npy, or the first tensor of a .safetensors file. Symmetric
groups, everything else as the library has it (group-aware activation order, damping of its own choice), in float32 because the CPU has no
fast bf16. OUTPUT gets the GPTQ-layout folder and `seconds.json`; `seconds` is the quantization and packing, without loading and saving.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.numpy import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    tokens = np.load(given.tokens) if given.tokens.suffix == ".npy" else next(iter(load_file(given.tokens).values()))

    start = time.perf_counter()
    config = QuantizeConfig(bits=given.bits, group_size=given.group, sym=True, desc_act=False, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(given.model), config, dtype=torch.float32)
    loaded = time.perf_counter()
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(samples, batch_size=given.batch, backend=BACKEND.GPTQ_TORCH)
    done = time.perf_counter()
    model.save(str(given.output))
    times = {"seconds": done - loaded, "load_seconds": loaded - start, "save_seconds": time.perf_counter() - done}
    memory = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    about = {"rival": "GPTQModel", "version": version("gptqmodel"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {"bits": given.bits, "group": given.group, "batch": given.batch, "tokens": list(tokens.shape)}
    (given.output / "seconds.json").write_text(json.dumps({**about, **settings, **times, **memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
