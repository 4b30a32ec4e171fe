"""Size against the bytes of a saved folder and a count by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from aerogel.evaluate.size import Size
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.numerics.quantize import quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.tiny import FAMILIES


def test_parts_add_up_to_the_file(tmp_path: Path) -> None:
    module = FAMILIES["llama"].build()
    module.save_pretrained(tmp_path)
    found = Size().measure(Network(module, Family("llama", ("llama",)), origin=tmp_path))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert found["memory_bytes"] == found["stored_bytes"] == weights == sum(found["parts"].values())
    assert 0 < found["disk_bytes"] - weights < 8192, "the file adds its header"
    assert found["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert found["bits_per_weight"] == 32


def test_shared_weights_count_once() -> None:
    module = FAMILIES["qwen2"].build()
    module.lm_head.weight = module.model.embed_tokens.weight
    found = Size().measure(Network(module, Family("llama", ("llama",))))
    assert found["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert found["disk_bytes"] is None


def test_stored_dtype_decides_what_floats_take() -> None:
    found = Size().measure(Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), stored_dtype=torch.bfloat16))
    assert found["memory_bytes"] == 2 * found["stored_bytes"]
    assert found["bits_per_weight"] == 16


def test_quantized_linears_count_what_they_store() -> None:
    scheme, linear = Scheme.parse("W4A16_G64"), nn.Linear(128, 64)
    grid = stored_grid(weight_grid(linear.weight, scheme.weights), torch.bfloat16)
    quantized = QuantLinear.from_codes(linear, scheme, quantize(linear.weight.detach(), grid, scheme.weights), grid, dtype=torch.bfloat16)
    found = Size().measure(Network(nn.Sequential(quantized, nn.LayerNorm(64)), Family("llama", ("llama",)), stored_dtype=torch.bfloat16))
    codes, scales, shape, bias, norm = 128 * 64 // 2, 2 * 64 * 2, 16, 64 * 2, 2 * 64 * 2
    assert found["parts"] == {"quantized layers": codes + scales + shape + bias, "norms and others": norm}
    assert found["parameters"] == 128 * 64 + 64 + 128
