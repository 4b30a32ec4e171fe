"""GPTQ by llm-compressor, in its own environment.

    .envs/llmcompressor/bin/python benchmarks/rivals/llmcompressor_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8]

MODEL is a Hugging Face folder; TOKENS an integer array (samples, length) in .npy, or the first tensor of a .safetensors file. Symmetric
groups, everything else as the library has it (activation order with static groups, damping 0.01), in float32 because the CPU has no
fast bf16. OUTPUT gets the compressed-tensors folder and `seconds.json`; `seconds` is the quantization without loading and saving.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM


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
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    loaded = time.perf_counter()
    weights = QuantizationArgs(num_bits=given.bits, symmetric=True, strategy="group", group_size=given.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=given.batch,
    )
    done = time.perf_counter()
    model.save_pretrained(given.output, save_compressed=True)
    for file in given.model.glob("*token*"):
        shutil.copy(file, given.output)
    times = {"seconds": done - loaded, "load_seconds": loaded - start, "save_seconds": time.perf_counter() - done}
    memory = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    about = {"rival": "llm-compressor", "version": version("llmcompressor"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {"bits": given.bits, "group": given.group, "batch": given.batch, "tokens": list(tokens.shape)}
    (given.output / "seconds.json").write_text(json.dumps({**about, **settings, **times, **memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
