"""Budgets with a bound on how long a module may be reused, against all masks that there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.runtime.feature_cache.budgets import Budget

T, N = 5, 2
SLOTS = [(step, module) for step in range(1, T) for module in range(N)]


def longest(mask_TN: Tensor) -> int:
    """The most steps in a row at which a module is reused."""
    lines = ("".join("1" if one else "0" for one in column_T) for column_T in mask_TN.T.tolist())
    return max(len(range_) for line in lines for range_ in line.split("1"))


def every(budget: Budget) -> list[Tensor]:
    """All masks that keep to the bound and meet the budget."""
    made = []
    for runs in product((True, False), repeat=len(SLOTS)):
        mask_TN = torch.ones(T, N, dtype=torch.bool)
        mask_TN[1:] = torch.tensor(runs).view(T - 1, N)
        if longest(mask_TN) <= budget.max_age and budget.is_met(mask_TN):
            made.append(mask_TN)
    return made


def cases() -> Iterator[tuple[Budget, list[tuple[int, int]]]]:
    """Budgets of whole cache entries and of costs that differ, each with an order; some cannot be had."""
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        cost_N = (1.0, 1.0) if number % 2 else tuple((torch.rand(N, generator=generator) + 0.2).tolist())
        saving = float(torch.rand((), generator=generator)) * (T - 1) * sum(cost_N)
        order = [SLOTS[place] for place in torch.randperm(len(SLOTS), generator=generator).tolist()]
        yield Budget(cost_N, round(saving) if number % 2 else saving, 1 + number % 3), order


def literal(budget: Budget, order: list[tuple[int, int]], masks: list[Tensor]) -> Tensor:
    """Entry after entry is reused if one of the masks reuses it beside those before, until it is enough; then the last run again first."""
    taken: list[tuple[int, int]] = []
    made = torch.ones(T, N, dtype=torch.bool)
    for entry in order:
        with_it = [mask_TN for mask_TN in masks if not mask_TN[entry]]
        if with_it and not budget.is_met(made):
            masks, made[entry] = with_it, False
            taken.append(entry)
    for entry in reversed(taken):
        made[entry] = True
        if not budget.is_met(made):
            made[entry] = False
    return made


def test_decoding_keeps_to_the_bound_and_gives_up_no_more_slots_for_it_than_it_must() -> None:
    had = 0
    for budget, order in cases():
        if masks := every(budget):
            had += 1
            made = budget.decoded(order, (T, N))
            assert budget.allowed(made)
            assert torch.equal(made, literal(budget, order, masks))
    assert 20 < had < 60


def test_a_budget_that_the_bound_forbids_is_refused_and_no_other() -> None:
    for budget, _ in cases():
        if every(budget):
            assert Budget(budget.cost_N, budget.saving).with_max_reuse(budget.max_age, T) == budget
        else:
            with pytest.raises(AerogelError, match=rf"save .*; with max_age {budget.max_age} each of 2 modules is cached at \d of 5 steps"):
                Budget(budget.cost_N, budget.saving).with_max_reuse(budget.max_age, T)


def test_what_can_be_reached_is_what_all_masks_say() -> None:
    generator = torch.Generator().manual_seed(1)
    for budget, _ in cases():
        masks = every(budget)
        for _ in range(10):
            mask_TN = torch.rand(T, N, generator=generator) > 0.4
            mask_TN[0] = True
            assert budget.reachable(mask_TN) == any(not (~mask_TN & other_TN).any() for other_TN in masks)
            assert budget.allowed(mask_TN) == (longest(mask_TN) <= budget.max_age)


@pytest.mark.parametrize(("max_age", "bound"), [(0, 4), (4, 4), (9, 4), (2, 2)])
def test_a_bound_that_no_generation_reaches_changes_nothing(max_age: int, bound: int) -> None:
    order: Any = sorted(SLOTS, key=lambda entry: (entry[1], entry[0]))
    budget = Budget((1.0, 1.0), 4.0).with_max_reuse(max_age, T)
    assert longest(budget.decoded(order, (T, N))) == bound


def test_only_slots_that_are_offered_are_counted_on() -> None:
    """With a bound of 1, nothing can be taken beside step 2 unless step 4 is there too."""
    budget = Budget((1.0,), 2.0, 1)
    assert (~budget.decoded([(2, 0), (1, 0), (3, 0)], (5, 1))).nonzero().tolist() == [[1, 0], [3, 0]]
    assert (~budget.decoded([(2, 0), (1, 0), (3, 0), (4, 0)], (5, 1))).nonzero().tolist() == [[2, 0], [4, 0]]
