"""Folders with layers that only this package knows: transformers by itself refuses them, and does not go on with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import aerogel
from aerogel.engine.exporting import export
from aerogel.io import empty_weight
from aerogel.layers.scaled_input import ScaledInput
from tests.folders import model_folder
from tests.registration import registered

IDS_BT = torch.arange(24).view(2, 12)


TRANSPOSED: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "W4A16_G32"},
    "gptq": {"scheme": "W4A16_G32"},
    "sparsegpt": {"scheme": "W4A16_G32", "sparsity": 0.5},
}


def compressed(folder: Path, kind: str, *before: dict[str, Any]) -> Path:
    """Compress a model with such layers: Conv1D in 4 bits by the method `kind`, or linear layers with scaled inputs in a scheme."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32"}
    if kind in TRANSPOSED:
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, **sizes))
        step: dict[str, Any] = {kind: TRANSPOSED[kind]}
    else:
        config = transformers.GPTNeoXConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **sizes)
        model = transformers.GPTNeoXForCausalLM(config)
        step = {"awq": {"scheme": kind, "unmapped": "keep"}}
    model.save_pretrained(folder / "in")
    samples = [torch.arange(start, start + 48)[None] % 64 for start in range(4)]
    aerogel.compress(folder / "in", {"steps": [*before, step]}, output=folder / "out", samples=samples, measures=())
    return folder / "out"


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(IDS_BT).logits
    return found


@pytest.mark.parametrize("kind", [*TRANSPOSED, "W4A16_G32", "W8A8"])
def test_plain_transformers_refuses_the_folder(kind: str, tmp_path: Path) -> None:
    folder = compressed(tmp_path, kind)
    named = json.loads((folder / "config.json").read_text())["quantization_config"]["empty_weight"]
    assert load_file(folder / "model.safetensors")[named].shape == (0,)
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)

    network = aerogel.load(folder, lazy=False)
    if kind not in TRANSPOSED:
        assert any(isinstance(part, ScaledInput) for part in network.module.modules())
    expected = logits(network.module)
    with registered():
        opened, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(logits(opened), expected)
    assert not any(found.values())


def test_it_is_written_again_with_what_was_opened(tmp_path: Path) -> None:
    folder = compressed(tmp_path, "rtn")
    samples = [torch.arange(48)[None]]
    aerogel.compress(folder, {"steps": [{"kv_cache_int": {}}]}, output=tmp_path / "again", samples=samples, measures=())
    first, second = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_folder_of_linear_layers_has_none(tmp_path: Path) -> None:
    model_folder(tmp_path / "in")
    aerogel.compress(tmp_path / "in", {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, output=tmp_path / "out")
    assert empty_weight.KEY not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]


def test_bit_masks_need_none(tmp_path: Path) -> None:
    folder = compressed(tmp_path, "rtn", {"magnitude": {"sparsity": 0.5}})
    export(folder, "bitmask", tmp_path / "masked")
    assert empty_weight.KEY not in json.loads((tmp_path / "masked/config.json").read_text())["quantization_config"]
    assert torch.equal(*(logits(aerogel.load(each, lazy=False).module) for each in (folder, tmp_path / "masked")))


@pytest.mark.parametrize("damage", ["gone", "with values"])
def test_a_damaged_one_is_refused(damage: str, tmp_path: Path) -> None:
    folder = compressed(tmp_path, "rtn")
    (folder / "aerogel.json").unlink()  # it has checksums
    file, name = folder / "model.safetensors", "transformer.h.0.attn.c_attn.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors if damage == "gone" else {**tensors, name: torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(aerogel.AerogelError, match=rf"{name} is the empty_weight"):
        aerogel.load(folder)
