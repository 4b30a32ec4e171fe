"""Quantized checkpoints that are opened as float models: weights are dequantized one by one as they are read. One file a format.

Legend: O outputs, I inputs, R x C the grid of scales, G groups of a row, B bytes of a group. Leading dimensions are experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aerogel.io.checkpoint import Checkpoint, Dequantize
from aerogel.io.dequantize import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from aerogel.io.dequantize.blocks import dequantize_blocks
from aerogel.io.dequantize.fp8 import block_of
from aerogel.io.dequantize.mxfp4 import dequantize_mxfp4
from aerogel.io.quantized import configs_in, quantization_of
from aerogel.io.record import files

__all__ = ["block_of", "dequantize_blocks", "dequantize_mxfp4", "dequantizer_of", "told"]

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FORMATS: Mapping[str, Callable[[Mapping[str, Any], Path, torch.dtype], Dequantize]] = {
    "awq": awq.dequantizer,
    "bitsandbytes": bitsandbytes.dequantizer,
    "fp8": fp8.dequantizer,
    "gptq": gptq.dequantizer,
    "mxfp4": mxfp4.dequantizer,
}
"""By quant_method: (quantization_config, path of config.json, dtype of the floats) -> what finds the quantized tensors."""


def dequantizer_of(settings: dict[str, Any], folder: Path, compressed: bool = False) -> Dequantize | None:
    """Return what turns a folder's quantized tensors into floats; None where its config.json names no such format.

    compressed-tensors, whose layers can be opened as they are, is one of them where `compressed` asks for it, unless `compress` wrote the
    folder. Raises AerogelError, like what it returns, on a config or tensors that do not fit together.
    """
    config, where = quantization_of(settings), folder / "config.json"
    method = config.get("quant_method")
    if isinstance(method, str) and method in _FORMATS:
        return _FORMATS[method](config, where, _dtype_of(settings))
    if compressed and method == "compressed-tensors" and not (folder / files.FILE).exists():
        return compressed_tensors.dequantizer(config, where, _dtype_of(settings))
    return None


def told(checkpoint: Checkpoint) -> str | None:
    """Return a line that says how weights were quantized on disk and what became of them; None where none was."""
    made = {name: one for name, one in checkpoint.dequantized().items() if one.format}  # others are as they were, but for an adapter
    if not made:
        return None
    formats = ", ".join(sorted({one.format for one in made.values()}))
    dtype = str(next(iter(made.values())).entry.dtype).removeprefix("torch.")
    unread = " and its scales of activations are not used" if checkpoint.unread() else ""
    return f"the source is quantized ({formats}); its weights are dequantized to {dtype}{unread}"


def _dtype_of(settings: dict[str, Any]) -> torch.dtype:
    """The float dtype that the config names for the model, or for the language model in it; else bfloat16."""
    for part in configs_in(settings):
        for key in ("dtype", "torch_dtype"):
            if (named := str(part.get(key)).removeprefix("torch.")) in _FLOATS:
                return _FLOATS[named]
    return torch.bfloat16
