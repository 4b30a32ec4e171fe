"""Products of an MoE model's experts over the pairs of token and expert that are left, and over no others.

Legend: E experts, T tokens, K experts a token is routed to, P pairs that are left, H hidden width. An index of E says "dropped": such a
pair is not multiplied, not even by zero. `loop` and `grouped` take only the pairs that are left, which a host has to count; `fixed` keeps
all T * K rows in place and tells the kernel where to stop, so that its shapes do not depend on the data (CUDA graphs, torch.compile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.kernels import selection

Expert = Callable[[int, Tensor], Tensor]
"""(number, x_PH) -> y_PH."""
Bank = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_PH sorted by expert, expert_P, end_E of each expert's rows) -> y_PH; rows behind the last end may hold anything."""


class Pairs(NamedTuple):
    """Pairs in the order of their experts."""

    place_P: Tensor
    """Index of an assignment among all T * K."""
    expert_P: Tensor
    count_E: Tensor


def left(index_TK: Tensor, experts: int) -> Pairs:
    """Return the pairs that were not dropped, those of an expert in the order of their tokens."""
    index_N = index_TK.reshape(-1)
    place_P = (index_N < experts).nonzero()[:, 0]
    expert_P, order_P = index_N[place_P].sort(stable=True)
    return Pairs(place_P[order_P], expert_P, expert_P.bincount(minlength=experts))


def loop(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int, run: Expert) -> Tensor:
    """Weighted sum of each token's experts, one expert after another; an expert without tokens does not run."""
    pairs, top = left(index_TK, experts), index_TK.shape[1]
    sum_TH = torch.zeros_like(x_TH, dtype=_summed(x_TH))
    token_P, weight_P = pairs.place_P // top, weight_TK.reshape(-1)[pairs.place_P, None]
    start = 0
    for number, count in enumerate(pairs.count_E.tolist()):
        if count:
            own = slice(start, start + count)
            y_PH = run(number, x_TH[token_P[own]])
            sum_TH.index_add_(0, token_P[own], (y_PH * weight_P[own]).to(sum_TH.dtype))
            start += count
    return sum_TH.to(x_TH.dtype)


def grouped(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int, run: Bank) -> Tensor:
    """Weighted sum of each token's experts, all experts in one product."""
    pairs, top = left(index_TK, experts), index_TK.shape[1]
    sum_TH = torch.zeros_like(x_TH, dtype=_summed(x_TH))
    if not len(pairs.place_P):
        return sum_TH.to(x_TH.dtype)
    token_P, weight_P = pairs.place_P // top, weight_TK.reshape(-1)[pairs.place_P, None]
    y_PH = run(x_TH[token_P], pairs.expert_P, pairs.count_E.cumsum(0).int())
    return sum_TH.index_add_(0, token_P, (y_PH * weight_P).to(sum_TH.dtype)).to(x_TH.dtype)


def fixed(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int, run: Bank) -> Tensor:
    """Weighted sum of each token's experts with shapes that do not depend on what was dropped; nothing waits for the device.

    Dropped pairs are sorted behind all others, where the grouped product stops; what it leaves there is never read as a number.
    """
    expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
    dropped_N = expert_N >= experts
    # Not bincount or histc: the one has a shape that depends on the data, the other knows no integers on a CPU.
    end_E = torch.searchsorted(expert_N, torch.arange(experts, device=expert_N.device), right=True).int()
    token_N = order_N // index_TK.shape[1]
    y_NH = run(x_TH[token_N], expert_N.clamp(max=experts - 1), end_E)
    y_NH = (y_NH * weight_TK.reshape(-1)[order_N, None]).masked_fill(dropped_N[:, None], 0.0)
    back_NH = torch.zeros_like(y_NH, dtype=_summed(x_TH))
    back_NH[order_N] = y_NH.to(back_NH.dtype)
    return back_NH.view(*index_TK.shape, -1).sum(1).to(x_TH.dtype)


def fastest(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, shape: tuple[int, int], one: Expert, all_: Bank) -> Tensor:
    """By the loop or in groups, whichever was faster when so many pairs of such experts were first met; timed on that very call.

    `shape` is (E, inner width). Pair counts with the same number of bits share a choice. Where shapes must not depend on the data, and on
    devices that a host would have to wait for, the fixed form.
    """
    experts, _ = shape
    if torch.compiler.is_compiling() or x_TH.device.type != "cpu":
        return fixed(x_TH, index_TK, weight_TK, experts, all_)
    if torch.is_grad_enabled() and x_TH.requires_grad:
        return grouped(x_TH, index_TK, weight_TK, experts, all_)
    pairs = int((index_TK < experts).sum())
    ways: dict[str, Callable[[], Tensor]] = {
        "grouped": lambda: grouped(x_TH, index_TK, weight_TK, experts, all_),
        "loop": lambda: loop(x_TH, index_TK, weight_TK, experts, one),
    }
    key = ("experts", *shape, x_TH.shape[1], x_TH.dtype, torch.get_num_threads(), pairs.bit_length())
    return ways[selection.fastest(key, lambda: ways, x_TH.device)]()


def _summed(x: Tensor) -> torch.dtype:
    """Dtype of the accumulator: half precision would round after every expert."""
    return torch.promote_types(x.dtype, torch.float32)
