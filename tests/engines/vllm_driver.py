"""Serves a folder in vLLM: the first greedy token after each prompt, and the loss of rows of tokens. Runs in vLLM's own environment.

python vllm_driver.py FOLDER ASKED.json ANSWERED.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

QUANTIZATION = json.loads((Path(sys.argv[1]) / "config.json").read_text()).get("quantization_config", {})
FLOAT8 = QUANTIZATION.get("format") == "float-quantized" or QUANTIZATION.get("quant_method") == "modelopt"
if FLOAT8 and torch.cpu._is_amx_tile_supported():
    # On CPUs with AMX torch leaves products of float8 matrices to oneDNN, which did not answer 32 prompts in an hour; without it they are
    # of float32 matrices, as on other CPUs. This line also runs in the processes that vLLM starts, because they import this file.
    # Products of integers need oneDNN there.
    torch.backends.mkldnn.enabled = False


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, asked, answered = sys.argv[1:]
    given = json.loads(Path(asked).read_text())
    engine = LLM(folder, max_model_len=512, max_num_batched_tokens=512, enforce_eager=True, dtype="bfloat16")

    def ask(rows: list[list[int]], **options: int) -> list:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, **options)
        return engine.generate([{"prompt_token_ids": row} for row in rows], sampling)

    first = [answer.outputs[0].token_ids[0] for answer in ask(given["prompts"])]
    losses = []
    for row, answer in zip(given["rows"], ask(given["rows"], prompt_logprobs=0), strict=True):
        losses += [-found[token].logprob for token, found in zip(row[1:], answer.prompt_logprobs[1:], strict=True)]
    Path(answered).write_text(json.dumps({"first": first, "loss": sum(losses) / len(losses)}))
    engine.llm_engine.engine_core.shutdown()
    os._exit(0)  # its threads may abort the interpreter's own end


if __name__ == "__main__":
    main()
