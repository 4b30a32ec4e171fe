"""Attention written out gives what torch's own gives, whatever is asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from aerogel.numerics.attention import OPERANDS, attention


def tensors(keys: int = 7, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, heads, keys, 8), (2, heads, keys, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("keys", "heads", "kwargs"),
    [
        (7, 4, {}),
        (5, 4, {"is_causal": True}),
        (7, 4, {"scale": 0.3}),
        (7, 2, {"enable_gqa": True}),
        (7, 4, {"attn_mask": torch.arange(35).view(5, 7) % 3 > 0}),
        (7, 4, {"attn_mask": torch.arange(35.0).view(5, 7) % 3}),
        (7, 4, {"attn_mask": torch.arange(5)[:, None].expand(5, 7) > 0}),  # the first query sees nothing
    ],
)
def test_it_is_torchs_attention(keys: int, heads: int, kwargs: dict[str, Any]) -> None:
    given = tensors(keys, heads)
    torch.testing.assert_close(attention(*given, **kwargs, change=lambda _, x: x), scaled_dot_product_attention(*given, **kwargs))


def test_every_operand_is_changed_once() -> None:
    seen: dict[str, torch.Size] = {}

    def change(operand: str, x: torch.Tensor) -> torch.Tensor:
        assert operand not in seen
        seen[operand] = x.shape
        return 2 * x if operand == "value" else x

    given = tensors()
    changed = attention(*given, change=change)
    assert list(seen) == list(OPERANDS)
    assert seen["probabilities"] == (2, 4, 5, 7)
    torch.testing.assert_close(changed, 2 * scaled_dot_product_attention(*given))
