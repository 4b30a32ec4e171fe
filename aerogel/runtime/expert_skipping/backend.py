"""The experts implementation `aerogel` of transformers: dropped assignments are not computed.

Registered when this module is imported; `model.set_experts_implementation("aerogel")` chooses it, with or without a policy on. An index
of E (the number of experts) means "dropped". The stock implementations must not be given it: but for the eager one they read past the
last expert or leave rows unwritten.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from aerogel.kernels.experts import fastest

NAME = "aerogel"


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of each token's experts that were not dropped: (T, H), (T, K), (T, K) -> (T, H)."""
    shape = (module.num_experts, module.down_proj.shape[1 if module.is_transposed else 2])
    return fastest(hidden_states, top_k_index, top_k_weights, shape, partial(_one, module), partial(_all, module))


def _one(module: Any, number: int, x_PH: Tensor) -> Tensor:
    """One expert on its tokens."""

    def linear(x: Tensor, key: str) -> Tensor:
        weight = getattr(module, key)[number]
        y = x.to(weight.dtype) @ (weight if module.is_transposed else weight.T)
        return y + getattr(module, f"{key}_bias")[number] if module.has_bias else y

    return _finished(module, linear(_activated(module, linear(x_PH, _first(module))), "down_proj"))


def _all(module: Any, x_PH: Tensor, expert_P: Tensor, end_E: Tensor) -> Tensor:
    """All experts on rows sorted by expert; rows behind the last end hold anything."""

    def linear(x: Tensor, key: str) -> Tensor:
        weight = getattr(module, key)
        y = grouped_product(x.to(weight.dtype), weight if module.is_transposed else weight.transpose(1, 2), end_E)
        return y + getattr(module, f"{key}_bias")[expert_P] if module.has_bias else y

    return _finished(module, linear(_activated(module, linear(x_PH, _first(module))), "down_proj"))


def grouped_product(x_PI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    """Torch's grouped product; where a compiler cannot trace that, the operator that transformers has for the same."""
    if torch.compiler.is_compiling() and weight_EIO.dtype != torch.bfloat16:
        return torch.ops.transformers.grouped_mm_fallback(x_PI, weight_EIO, end_E)
    return grouped_mm(x_PI, weight_EIO, offs=end_E)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activated(module: Any, y: Tensor) -> Tensor:
    result: Tensor = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return result


def _finished(module: Any, y: Tensor) -> Tensor:
    result: Tensor = module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y
    return result


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
