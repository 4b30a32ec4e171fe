"""GPTQ by GPTQModel, in its own environment.

    .envs/gptqmodel/bin/python benchmarks/rivals/gptqmodel_gptq.py MODEL TOKENS OUTPUT [--bits 4 --group 64 --batch 8 --dtype float32]

Symmetric groups, everything else as the library has it (group-aware activation order, damping of its own choice). OUTPUT gets the
GPTQ-layout folder and seconds.json; `seconds` is the quantization and packing, without loading and saving.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from driver import DTYPES, arguments, report, tokens_of
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    given = arguments(__doc__)
    start = time.perf_counter()
    config = QuantizeConfig(bits=given.bits, group_size=given.group, sym=True, desc_act=False, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(given.model), config, dtype=DTYPES[given.dtype])
    loaded = time.perf_counter()
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens_of(given)]
    model.quantize(samples, batch_size=given.batch, backend=BACKEND.GPTQ_TORCH)
    done = time.perf_counter()
    model.save(str(given.output))
    saved = time.perf_counter()
    report(given, "GPTQModel", version("gptqmodel"), seconds=done - loaded, load_seconds=loaded - start, save_seconds=saved - done)


if __name__ == "__main__":
    main()
