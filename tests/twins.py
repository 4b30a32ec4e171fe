"""Twin folders of a tiny model: one whose linear layers are quantized by a format of others, one with the floats that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.engine.opening import open_model
from tests.folders import model_folder

UP = "model.layers.0.mlp.up_proj"
Pack = Callable[[str, Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]
"""(name of a layer, its weight, random numbers) -> (the tensors that others store, by full name; the weight_OI that they stand for)."""


def twins(tmp_path: Path, pack: Pack, config: Mapping[str, Any], kind: str = "llama") -> tuple[Path, Path]:
    """Write both folders, in bfloat16."""
    quantized, plain = (model_folder(tmp_path / name, kind, torch.bfloat16) for name in ("quantized", "plain"))
    stored, floats, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, weight in load_file(plain / "model.safetensors").items():
        floats[name] = stored[name] = weight
        if weight.ndim == 2 and re.search(r"(_proj|\.w[123])\.weight$", name):
            del stored[name]
            made, exact = pack(name.removesuffix(".weight"), weight, generator)
            stored |= made
            floats[name] = exact.to(torch.bfloat16).contiguous()
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    save_file(floats, plain / "model.safetensors", {"format": "pt"})
    configure(quantized, config)
    return quantized, plain


def configure(folder: Path, quantization: Any) -> None:
    """Write a quantization_config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def change(folder: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Replace tensors of a folder, or remove them."""
    path = folder / "model.safetensors"
    found = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(found, path, {"format": "pt"})


def opened(folder: Path, lazy: bool = True, **options: Any) -> nn.Module:
    """Return the module of a folder with its weights in memory."""
    network = open_model(folder, lazy=lazy, dtype=torch.bfloat16, **options)
    if lazy:
        assert network.checkpoint is not None
        assert all(parameter.is_meta for block in network.blocks().values() for parameter in block.parameters())
        network.checkpoint.materialise(network.module)
    return network.module


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two models have the same tensors bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors on disk."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def words(codes: list[int], bits: int) -> list[int]:
    """Pack codes into a stream of bits, literally: one long integer, cut into signed words of 32 bits."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    cut = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


def random_codes(shape: tuple[int, ...], high: int, generator: torch.Generator) -> Tensor:
    """Return codes from 0 to below `high`."""
    return torch.randint(0, high, shape, generator=generator)
