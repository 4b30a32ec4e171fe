"""Recorded calls take the dtype of a transformers model that was opened from a folder: processors make float32, whatever it computes in."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import aerogel
from aerogel.model.calls import Call

ZOO = Path(__file__).resolve().parents[2] / "zoo"
STEPS = {"steps": [{"wanda": {"sparsity": 0.5, "targets": ["Linear", "Conv2d"]}}]}


def calls(dtype: torch.dtype) -> list[Call]:
    pixels = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return [Call((), {"pixel_values": pixels.to(dtype)})]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_float32_are_read_as_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    runs = [
        aerogel.compress(aerogel.load(ZOO / "fashion-judge", lazy=False, dtype=dtype), STEPS, samples=calls(given), measures=())
        for given in (torch.float32, dtype)
    ]
    left, right = (run.network.module.state_dict() for run in runs)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_model_in_memory_gets_calls_as_they_are() -> None:
    module = copy.deepcopy(aerogel.load(ZOO / "fashion-judge", lazy=False, dtype=torch.float32).module).bfloat16()
    with pytest.raises((RuntimeError, aerogel.AerogelError), match="same"):
        aerogel.compress(module, STEPS, samples=calls(torch.float32), measures=())
