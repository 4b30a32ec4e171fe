"""Weights that are no numbers are refused wherever they lie; limits of clamps that were never set are not taken for weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aerogel
from aerogel.engine.numbers import check_weights
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from tests.tiny import FAMILIES

INFINITY, NAN = torch.inf, torch.nan


class Clamped(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).clamp(max=self.limit)


def test_a_limit_may_be_infinite_and_not_nan() -> None:
    check_weights(open_model(Clamped(INFINITY)))
    with pytest.raises(AerogelError, match="limit holds NaN or infinity"):
        check_weights(open_model(Clamped(NAN)))


@pytest.mark.parametrize("bad", [INFINITY, NAN])
def test_a_weight_may_be_neither(bad: float) -> None:
    module = Clamped(1.0)
    module.linear.weight.data[0, 0] = bad
    with pytest.raises(AerogelError, match=r"linear\.weight holds NaN or infinity"):
        check_weights(open_model(module))


@pytest.mark.parametrize("bad", [INFINITY, NAN])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_scale_of_quantized_weights_may_be_neither(bad: float, lazy: bool, tmp_path: Path) -> None:
    aerogel.compress(
        FAMILIES["llama"].build(), {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, samples=FAMILIES["llama"].calls(1),
        output=tmp_path / "out", measures=(),
    )  # fmt: skip
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][0, 0] = bad
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AerogelError, match=rf"{name} holds NaN or infinity"):
        check_weights(open_model(tmp_path / "out", lazy=lazy))
