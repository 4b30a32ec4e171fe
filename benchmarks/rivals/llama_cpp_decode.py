"""Greedy tokens from llama.cpp, on demand: runs in the environment of llama-cpp-python, driven through its pipes by ../decode.py.

python llama_cpp_decode.py FILE.gguf THREADS LENGTH     # then one JSON line {"prompt": [ids], "new": n} for each turn
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def turn(model: Any, prompt: list[int], new: int) -> dict[str, Any]:
    """Read the prompt, then take the likeliest token `new` times; nothing but the evaluation and the maximum is timed."""
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    tokens, steps = [best(model)], []
    prefill = time.perf_counter() - start
    while len(tokens) < new:
        start = time.perf_counter()
        model.eval(tokens[-1:])
        tokens.append(best(model))
        steps.append(time.perf_counter() - start)
    return {"prefill_seconds": prefill, "step_seconds": steps, "tokens": tokens}


def best(model: Any) -> int:
    """The token with the largest logit of the last position."""
    return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax())


def main() -> None:
    """Answer every line with one line."""
    file, threads, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(file, n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(turn(model, wanted["prompt"], wanted["new"])), flush=True)


if __name__ == "__main__":
    main()
