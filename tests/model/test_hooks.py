"""Forwards that are replaced come back, also where somebody has wrapped them meanwhile, as accelerate does to offload weights."""

from __future__ import annotations

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from aerogel.model.hooks import patch_forward, patched


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_a_wrapper_that_came_meanwhile_stays_around_the_old_forward() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    wanted = layer(x)
    with patch_forward({layer: doubled}):
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert torch.equal(layer(x), 2 * x)
    assert next(layer.parameters()).is_meta
    assert torch.equal(layer(x), wanted), "its weights come for the forward"
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), wanted)


def test_a_wrapper_that_was_there_before_stays() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    wanted = layer(x)
    cpu_offload(layer, execution_device=torch.device("cpu"))
    wrapper = layer.__dict__["forward"]
    with patch_forward({layer: doubled}):
        assert patched(layer) is doubled
        assert torch.equal(layer(x), 2 * x)
    assert layer.__dict__["forward"] is wrapper
    assert torch.equal(layer(x), wanted)
