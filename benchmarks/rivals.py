"""Rivals: GPTQ and SparseGPT of other libraries, each in an environment of its own under .envs/, on the same folder and the same tokens.

    python benchmarks/rivals.py build [NAME ...]                                 # make the environments (about 1 GB each)
    python benchmarks/rivals.py run NAME MODEL_FOLDER TOKENS.npy OUTPUT_FOLDER   # quantize; OUTPUT_FOLDER/seconds.json has the time
    python benchmarks/rivals.py compare MODEL_FOLDER TEXT.npy OUTPUT_FOLDER ...  # log-perplexity of folders beside the original's

They cannot share ours: llm-compressor 0.14 wants an older transformers, GPTQModel 7.7 is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from aerogel.numerics.packing import unpack

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Rival:
    """A library and what its environment holds."""

    packages: tuple[str, ...]
    bare: tuple[str, ...] = ()
    """Packages that are installed without the dependencies they name."""


RIVALS = {
    "aerogel": Rival(()),
    "llmcompressor": Rival(("llmcompressor==0.14.*",)),
    "gptqmodel": Rival(
        ("transformers==5.23.0", "accelerate", "safetensors", "datasets", "numpy", "defuser", "device-smi", "logbar", "pypcre", "tokenicer",
         "threadpoolctl", "pillow", "requests"),
        bare=("gptqmodel==7.7.*",),
    ),
}  # fmt: skip


def build(name: str) -> Path:
    """Make the environment of a rival if it is not there yet; return its interpreter. Aerogel runs in the one that asks."""
    if name == "aerogel":
        return Path(sys.executable)
    rival, folder = RIVALS[name], ROOT / ".envs" / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(TORCH + "\n")  # else some package brings a CUDA build
        pip = [python, "-m", "pip", "install", "--quiet", "-c", constraints]
        subprocess.run([*pip, TORCH, *rival.packages], check=True)
        if rival.bare:
            subprocess.run([*pip, "--no-deps", *rival.bare], check=True)
        ready.touch()
    return python


def run(name: str, model: Path, tokens: Path, output: Path, *options: str, threads: int = 2, method: str = "gptq") -> dict[str, Any]:
    """Compress a folder with a rival in a process of its own and return its times and settings; `options` go to the driver."""
    driver = ROOT / "benchmarks" / "rivals" / f"{name}_{method}.py"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "GPTQMODEL_CPU_WORKERS": "2",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT) if name == "aerogel" else "",  # this checkout, whichever is installed
    }
    command = [build(name), driver, model.absolute(), tokens.absolute(), output.absolute(), *options]
    subprocess.run(command, check=True, env=environment, cwd=output.absolute().parent)
    return json.loads((output / "seconds.json").read_text())


def opened(folder: Path) -> nn.Module:
    """A float32 model with the dequantized weights of a folder in the GPTQ layout (2, 4 or 8 bits), else as transformers opens it."""
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", {})
    if quantization.get("quant_method") != "gptq":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    del config.quantization_config
    stored = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    weights = {name: value for name, value in stored.items() if name.rpartition(".")[0] not in names}
    weights |= {f"{name}.weight": _dense(stored, name, quantization["bits"]) for name in names}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def nats(model: nn.Module, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood of rows of tokens, in nats a token; the first of a row is given."""
    rows = torch.from_numpy(tokens.astype(np.int64))
    return float(np.mean([float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]))


def _dense(stored: dict[str, Tensor], name: str, bits: int) -> Tensor:
    scale_GO, g_idx = stored[f"{name}.scales"].float(), stored[f"{name}.g_idx"].long()
    codes_IO = unpack(stored[f"{name}.qweight"], bits, len(g_idx), packed_dim=0)
    zero_GO = unpack(stored[f"{name}.qzeros"], bits, scale_GO.shape[1]).float() + 1  # the layout stores zero points less one
    return ((codes_IO.float() - zero_GO[g_idx]) * scale_GO[g_idx]).T.contiguous()


def main() -> None:
    """Build, run or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build").add_argument("names", nargs="*", default=list(RIVALS))
    runner = verbs.add_parser("run")
    runner.add_argument("name", choices=list(RIVALS))
    for argument in ("model", "tokens", "output"):
        runner.add_argument(argument, type=Path)
    runner.add_argument("--threads", type=int, default=2)
    comparer = verbs.add_parser("compare")
    for argument in ("model", "tokens"):
        comparer.add_argument(argument, type=Path)
    comparer.add_argument("folders", type=Path, nargs="+")
    given, options = parser.parse_known_args()
    if given.verb == "build":
        for name in given.names:
            print(name, build(name))
    elif given.verb == "run":
        print(json.dumps(run(given.name, given.model, given.tokens, given.output, *options, threads=given.threads), indent=1))
    else:
        logging.disable_progress_bar()
        for folder in (given.model, *given.folders):
            print(f"{nats(opened(folder), np.load(given.tokens)):.4f} nats  {folder}")


if __name__ == "__main__":
    main()
