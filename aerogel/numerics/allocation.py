"""Allocation of zeros: which share of each layer is pruned so that a share of all weights is; no weight is changed.

Every rule returns shares with sum N_l s_l = s sum N_l, where N_l weights of layer l are counted, and 0 <= s_l < 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.numerics.sparsity import smallest

Shares = dict[str, float]
"""Share of zeros of each layer."""
Score = Callable[[Tensor], Tensor]
"""From a weight to the scores of its entries, of the same shape, not negative; the lowest are pruned."""
_SLACK = 1e-3
"""How far the sum of the zeros may be from the budget, as a share of all weights."""


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float, power: float = 1.0) -> Shares:
    """Return shares by the Erdős-Rényi kernel (arXiv:1911.11134): density is in proportion to (sum of dims / product of dims)^power.

    Layers that would keep more than all they have stay dense, and the others lose as much more. All dimensions of a convolution count.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: (sum(shape) / sizes[name]) ** power for name, shape in shapes.items()}
    kept, dense = (1 - sparsity) * sum(sizes.values()), set[str]()
    while True:
        rest = [name for name in shapes if name not in dense]
        factor = (kept - sum(sizes[name] for name in dense)) / sum(raw[name] * sizes[name] for name in rest)
        over = {name for name in rest if factor * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in dense else 1 - factor * raw[name] for name in shapes}
        # The rule takes out those of the largest density only, since the factor falls with each of them.
        most = max(raw[name] for name in over)
        dense |= {name for name in over if raw[name] == most}


def by_threshold(weights: Mapping[str, Tensor], sparsity: float, score: Score = torch.abs, cap: float = 1.0) -> Shares:
    """Return the shares of each layer that one threshold on the scores of all layers prunes.

    No layer loses more than the share `cap` of its weights, nor its last weight: where the threshold asks for more, the layer stays at the
    cap and the threshold moves until the others have made up for it. Raises AerogelError where the caps do not allow the sparsity.
    """
    most = {name: _most(weight.numel(), cap) for name, weight in weights.items()}
    zeros = round(sparsity * sum(weight.numel() for weight in weights.values()))
    if zeros > sum(most.values()):
        raise AerogelError(f"a sparsity of {sparsity:g} cannot be met with at most {cap:g} in a layer; prune less, or raise the cap")
    counts: dict[str, int] = {}
    while True:
        rest = {name: weight for name, weight in weights.items() if name not in counts}
        left = zeros - sum(counts.values())
        found = dict(zip(rest, _below(_Scored(list(rest.values()), score), left), strict=True)) if rest else {}
        over = {name: most[name] for name, count in found.items() if count > most[name]}
        if not over:
            return {name: {**found, **counts}[name] / weight.numel() for name, weight in weights.items()}
        counts |= over


def _most(size: int, cap: float) -> int:
    """Return the largest number of zeros of a layer: at least one weight stays."""
    return min(math.floor(cap * size + 1e-9), size - 1)


@dataclass(frozen=True)
class _Scored:
    """The scores of weights, made each time they are read: those of one layer are in memory at a time."""

    weights: Sequence[Tensor]
    score: Score

    def __iter__(self) -> Iterator[Tensor]:
        return (self.score(weight) for weight in self.weights)


def _below(scores: Iterable[Tensor], zeros: int) -> list[int]:
    """Return how many scores of each layer are among the `zeros` smallest of all; of equal ones the first."""
    threshold, ties = smallest(scores, zeros)
    counts = []
    for each in scores:
        values = each.float()
        first = min(int((values == threshold).sum()), ties)
        ties -= first
        counts.append(int((values < threshold).sum()) + first)
    return counts


def over_norm(order: int) -> Score:
    """Return the score of a layer's weights by magnitude over the layer's own L1 or L2 norm."""

    def score(weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(weight.float(), order, dtype=torch.float64).float()
        return weight.float().abs() / norm.clamp(min=torch.finfo(torch.float32).tiny)

    return score


def lamp(weight: Tensor) -> Tensor:
    """Return the scores of LAMP (arXiv:2010.07611): w^2 over the sum of the squares that are not smaller in this layer, itself included.

    Of equal magnitudes the first in the layer counts as the smallest.
    """
    square = weight.double().square().flatten()
    order = square.sort(stable=True)
    rest = order.values.flip(0).cumsum(0).flip(0)
    score = torch.empty_like(square)
    score[order.indices] = order.values / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return score.float().view_as(weight)


def by_energy(weights: Mapping[str, Tensor], sparsity: float, cap: float = 1.0, levels: int = 1000) -> Shares:
    """Return the shares at which every layer loses the same share of its energy, its sum of squares.

    A table has for each level of removed energy the largest share that removes no more, in each layer. Between the two entries around the
    sparsity the shares are interpolated, so that the budget is met. Raises AerogelError where the caps do not allow the sparsity.
    """
    level_E = torch.linspace(0, 1, levels + 1, dtype=torch.float64) ** 3  # half of Gaussian weights hold 7 % of their energy
    table = torch.stack([_shares_at(weight, level_E, cap) for weight in weights.values()])
    sizes = torch.tensor([weight.numel() for weight in weights.values()], dtype=torch.float64)
    overall_E = sizes @ table / sizes.sum()
    if sparsity > float(overall_E[-1]):
        raise AerogelError(f"a sparsity of {sparsity:g} cannot be met with at most {cap:g} in a layer; prune less, or raise the cap")
    after = int(torch.searchsorted(overall_E, sparsity))
    before = max(after - 1, 0)
    step = float(overall_E[after] - overall_E[before])
    part = (sparsity - float(overall_E[before])) / step if step > 0 else 0.0
    chosen = table[:, before] + part * (table[:, after] - table[:, before])
    return dict(zip(weights, chosen.tolist(), strict=True))


def _shares_at(weight: Tensor, level_E: Tensor, cap: float) -> Tensor:
    """Return the largest share of a layer that has no more than each level of its energy."""
    lost = weight.double().square().flatten().sort().values.cumsum(0)
    lost = lost / lost[-1].clamp(min=torch.finfo(torch.float64).tiny)
    count_E = torch.searchsorted(lost, level_E.to(lost.device), right=True).clamp(max=_most(weight.numel(), cap))
    return count_E.double().cpu() / weight.numel()


def require_met(shares: Shares, sizes: Mapping[str, int], sparsity: float) -> None:
    """Raise AssertionError unless shares meet the budget and are in their range."""
    zeros = sum(share * sizes[name] for name, share in shares.items())
    assert abs(zeros / sum(sizes.values()) - sparsity) <= _SLACK, f"allocated {zeros / sum(sizes.values()):g} of {sparsity:g}"
    assert all(0 <= share < 1 for share in shares.values()), "a share of zeros is at least 0 and below 1"


def from_bytes(sizes: Mapping[str, int], itemsizes: Mapping[str, int], budget: int) -> float:
    """Return the sparsity at which layers take so many bytes, each stored as one bit a weight and the weights that are not zero.

    Raises AerogelError where they take less as they are, or more without any weight.
    """
    bits = sum(sizes.values()) / 8
    values = sum(sizes[name] * itemsizes[name] for name in sizes)
    if budget >= values:
        raise AerogelError(f"budget_bytes is {budget:,}, and the layers that are meant take {values:,} as they are; give less")
    if budget <= bits:
        raise AerogelError(f"budget_bytes is {budget:,}, and the masks of the layers that are meant take {bits:,.0f} alone; give more")
    return max(0.0, 1 - (budget - bits) / values)


def corrected(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> Shares:
    """Return shares moved by the same amount of log-odds so that they meet the budget exactly; those at 0 stay at 0."""
    total = sparsity * sum(sizes.values())
    odds = {name: math.log(share / (1 - share)) for name, share in shares.items() if 0 < share < 1}

    def moved(by: float) -> Shares:
        return {name: 1 / (1 + math.exp(-max(-500.0, odds[name] + by))) if name in odds else share for name, share in shares.items()}

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        zeros = sum(share * sizes[name] for name, share in moved(middle).items())
        low, high = (middle, high) if zeros < total else (low, middle)
    return moved((low + high) / 2)


def soft_mask(weight: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    """Return how far each weight is kept by a threshold on its magnitude: sigmoid((|w| - t) / h), 0 or 1 away from it."""
    return ((weight.abs() - threshold) / width).sigmoid()


def soft_share(weight: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    """Return the share of zeros that the soft mask stands for, with a derivative by the threshold."""
    return 1 - soft_mask(weight, threshold, width).mean()
