"""Quantizes a folder with GPTQModel, and writes the weights that its own layers compute with. Runs in GPTQModel's own environment.

python gptqmodel_driver.py METHOD FOLDER OUTPUT WEIGHTS.safetensors [OPTION=VALUE ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import save_file

    method, folder, output, weights, *options = sys.argv[1:]
    os.chdir(Path(output).parent)  # where it writes a folder of logs
    given = {key: json.loads(value) for key, value in (option.split("=") for option in options)}
    layout, backend = {"gptq": ("gptq", BACKEND.GPTQ_TORCH), "awq": ("gemm", BACKEND.AWQ_TORCH)}[method]
    config = QuantizeConfig(quant_method=method, format=layout, device="cpu", offload_to_disk=False, **given)
    model = GPTQModel.load(folder, config, dtype=torch.float16)
    rows = torch.randint(3, 112, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4, backend=backend)
    model.save(output)
    opened = GPTQModel.load(output, backend=backend, device="cpu", dtype=torch.float16)
    layers = {name: part for name, part in opened.model.named_modules() if hasattr(part, "qweight")}
    with torch.no_grad():  # what a layer gives for each input alone is its weight
        found = {
            f"{name}.weight": part(torch.eye(part.in_features, dtype=torch.float16)).T.contiguous().clone() for name, part in layers.items()
        }
    save_file(found, weights)


if __name__ == "__main__":
    main()
