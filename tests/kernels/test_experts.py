"""Products over the assignments that are left against a literal sum; rows that were dropped are never multiplied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import grouped_mm

from aerogel.kernels.experts import fastest, fixed, grouped, loop

EXPERTS, HIDDEN = 5, 16


class Bank:
    """Experts of one matrix each, in both forms; it counts the rows that it multiplies."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weight_EHH = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.rows = 0

    def one(self, number: int, x_PH: Tensor) -> Tensor:
        """One expert."""
        self.rows += len(x_PH)
        return x_PH @ self.weight_EHH[number]

    def all(self, x_PH: Tensor, expert_P: Tensor, end_E: Tensor) -> Tensor:
        """All experts; rows behind the last end are poisoned, as memory that nobody wrote may be."""
        self.rows += int(end_E[-1])
        y_PH = grouped_mm(x_PH, self.weight_EHH, offs=end_E)
        y_PH[int(end_E[-1]) :] = torch.nan
        return y_PH


def literal(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, bank: Bank) -> Tensor:
    """Token by token, expert by expert, in double."""
    out_TH = torch.zeros_like(x_TH, dtype=torch.float64)
    for token, (indices, weights) in enumerate(zip(index_TK.tolist(), weight_TK.tolist(), strict=True)):
        for number, weight in zip(indices, weights, strict=True):
            if number < EXPERTS:
                out_TH[token] += weight * (x_TH[token].double() @ bank.weight_EHH[number].double())
    return out_TH


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Bank], Tensor]] = {
    "loop": lambda x, index, weight, bank: loop(x, index, weight, EXPERTS, bank.one),
    "grouped": lambda x, index, weight, bank: grouped(x, index, weight, EXPERTS, bank.all),
    "fixed": lambda x, index, weight, bank: fixed(x, index, weight, EXPERTS, bank.all),
    "fastest": lambda x, index, weight, bank: fastest(x, index, weight, (EXPERTS, HIDDEN), bank.one, bank.all),
}


def drawn(tokens: int, top: int, dropped: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(tokens, EXPERTS, generator=make).argsort(-1)[:, :top]
    weight_TK = torch.rand(tokens, top, generator=make)
    gone_TK = torch.rand(tokens, top, generator=make) < dropped
    return torch.randn(tokens, HIDDEN, generator=make), index_TK.masked_fill(gone_TK, EXPERTS), weight_TK.masked_fill(gone_TK, 0.0)


@pytest.mark.parametrize("way", WAYS)
@given(tokens=st.integers(1, 12), top=st.integers(1, EXPERTS), dropped=st.sampled_from([0.0, 0.3, 0.9, 1.0]), seed=st.integers(0, 99))
def test_is_the_literal_sum(way: str, tokens: int, top: int, dropped: float, seed: int) -> None:
    bank = Bank()
    x_TH, index_TK, weight_TK = drawn(tokens, top, dropped, seed)
    y_TH = WAYS[way](x_TH, index_TK, weight_TK, bank)
    torch.testing.assert_close(y_TH.double(), literal(x_TH, index_TK, weight_TK, bank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["loop", "grouped", "fixed"])
def test_rows_multiplied_are_the_pairs_that_are_left(way: str) -> None:
    x_TH, index_TK, weight_TK = drawn(40, 4, 0.6, 1)
    bank = Bank()
    WAYS[way](x_TH, index_TK, weight_TK, bank)
    assert 0 < bank.rows == int((index_TK < EXPERTS).sum()) < index_TK.numel()


@pytest.mark.parametrize("way", ["loop", "grouped", "fixed"])
def test_half_precision_sums_in_single(way: str) -> None:
    x_TH, index_TK, weight_TK = drawn(9, 4, 0.2, 2)
    bank = Bank(torch.bfloat16)
    y_TH = WAYS[way](x_TH.bfloat16(), index_TK, weight_TK.bfloat16(), bank)
    assert y_TH.dtype == torch.bfloat16
    exact_TH = literal(x_TH.bfloat16().float(), index_TK, weight_TK.bfloat16().float(), bank)
    assert (y_TH.double() - exact_TH).norm() / exact_TH.norm() < 5e-3


def test_shapes_do_not_depend_on_what_was_dropped_when_compiled() -> None:
    bank = Bank(torch.bfloat16)  # the only dtype in which torch traces a grouped product
    x_TH, whole_TK, weight_TK = (tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in drawn(6, 2, 0.0, 3))
    traced = torch.export.export(_Fixed(bank), (x_TH, whole_TK, weight_TK)).module()
    _, index_TK, _ = drawn(6, 2, 0.7, 3)
    torch.testing.assert_close(traced(x_TH, index_TK, weight_TK), WAYS["loop"](x_TH, index_TK, weight_TK, bank), rtol=0.02, atol=0.02)


class _Fixed(torch.nn.Module):
    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.weight_EHH = bank.weight_EHH

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return fixed(x_TH, index_TK, weight_TK, EXPERTS, lambda x, _, end: grouped_mm(x, self.weight_EHH, offs=end))
