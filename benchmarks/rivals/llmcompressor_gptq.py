"""GPTQ by llm-compressor, in its own environment.

    .envs/llmcompressor/bin/python benchmarks/rivals/llmcompressor_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8]

Symmetric groups, everything else as the library has it (activation order with static groups, damping 0.01). OUTPUT gets the
compressed-tensors folder and seconds.json; `seconds` is the quantization without loading and saving.
"""

from __future__ import annotations

import argparse
import shutil
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from driver import DTYPES, arguments, report, tokens_of
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def compress(given: argparse.Namespace, modifier: Any) -> None:
    """Compress with one modifier of the library, and write the time."""
    tokens = tokens_of(given)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=DTYPES[given.dtype])
    loaded = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}),
        recipe=modifier,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        batch_size=given.batch,
    )
    done = time.perf_counter()
    model.save_pretrained(given.output, save_compressed=True)
    for file in given.model.glob("*token*"):
        shutil.copy(file, given.output)
    saved = time.perf_counter()
    report(given, "llm-compressor", version("llmcompressor"), seconds=done - loaded, load_seconds=loaded - start, save_seconds=saved - done)


if __name__ == "__main__":
    asked = arguments(__doc__)
    weights = QuantizationArgs(num_bits=asked.bits, symmetric=True, strategy="group", group_size=asked.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compress(asked, GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]))
