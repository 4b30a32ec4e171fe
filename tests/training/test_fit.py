"""The fit recovers a teacher, keeps its best, repeats itself and survives what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.training.fit import Fit, History, fit
from aerogel.training.losses import normalized_mse


def regression(seed: int = 0) -> tuple[nn.Linear, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = nn.Linear(6, 3).requires_grad_(False), nn.Linear(6, 3).requires_grad_(False)
    for layer, scale in ((teacher, 1.0), (student, 0.01)):
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return teacher, student, torch.randn(64, 6, generator=generator)


def run(how: Fit, seed: int = 0) -> tuple[nn.Linear, nn.Linear, Tensor, History]:
    teacher, student, x_TI = regression()
    history = fit(
        list(student.parameters()),
        lambda batch: normalized_mse(student(x_TI[list(batch)]), teacher(x_TI[list(batch)])),
        len(x_TI),
        how,
        torch.Generator().manual_seed(seed),
    )
    return teacher, student, x_TI, history


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_linear_teacher_is_recovered(optimizer: str) -> None:
    with torch.no_grad():  # as in a compression run: the fit turns gradients on by itself
        teacher, student, _, history = run(Fit(steps=600, rate=0.05, optimizer=optimizer))  # type: ignore[arg-type]
    assert torch.allclose(student.weight, teacher.weight, atol=2e-3)
    assert torch.allclose(student.bias, teacher.bias, atol=2e-3)
    assert len(history.losses) == 600
    assert not student.weight.requires_grad
    assert student.weight.grad is None


def test_the_same_generator_gives_the_same_fit() -> None:
    first, again, other = (run(Fit(steps=20), seed)[1].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_is_kept() -> None:
    """A rate that diverges: whatever happens on the way, the student ends at its least loss."""
    teacher, student, x_TI, history = run(Fit(steps=60, rate=30.0, check=5, warmup=0, clip=0))
    assert history.best == 0
    assert max(history.checks.values()) > history.checks[0]
    assert torch.equal(student.weight, regression()[1].weight)
    _, student, x_TI, history = run(Fit(steps=60, batch=64, rate=0.5, check=7))
    final = float(normalized_mse(student(x_TI), teacher(x_TI)))
    assert final == pytest.approx(min(history.checks.values()), rel=1e-5)


POISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss is nan": lambda value, parameter: value * math.nan,
    "loss is inf": lambda value, parameter: value + math.inf,
    "gradient's norm is inf": lambda value, parameter: value + (parameter - parameter.detach()).sqrt().sum(),
}


@pytest.mark.parametrize("message", POISONS)
def test_what_is_not_finite_ends_the_fit_with_the_best(message: str) -> None:
    parameter = nn.Parameter(torch.tensor([4.0]))
    steps = 0

    def loss(batch: Sequence[int]) -> Tensor:
        nonlocal steps
        steps += torch.is_grad_enabled()
        value = parameter.square().sum()
        return POISONS[message](value, parameter) if steps == 18 else value

    history = fit([parameter], loss, 4, Fit(50, check=5, rate=0.1), torch.Generator().manual_seed(0))
    assert history.warning == f"the {message} at step 18 of 50; kept the parameters of step 15"
    assert parameter.item() ** 2 == pytest.approx(history.checks[15])


def test_nothing_to_fit_and_broken_from_the_start_are_errors() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(AerogelError, match="nothing to fit: 0 parameters"):
        fit([], lambda batch: parameter.sum(), 4, Fit(), torch.Generator())
    with pytest.raises(AerogelError, match="nan before the first step"):
        fit([parameter], lambda batch: parameter.sum() * math.nan, 4, Fit(), torch.Generator())
    assert parameter.requires_grad


def test_the_rate_rises_then_falls_to_its_floor() -> None:
    how = Fit(steps=100, rate=2.0, warmup=0.1, floor=0.25)
    rates = [how.rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.5, rel=0.01)
    assert Fit(steps=10, warmup=0).rate_at(0) == Fit().rate
