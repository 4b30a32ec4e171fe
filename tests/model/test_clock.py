"""The clock finds the row of a time step by looking it up, follows a denoiser's forwards, and refuses what it does not know."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.clock import Clock, PerRow


class Denoiser(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.seen: list[tuple[int, ...]] = []

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        self.seen.append(self.clock.rows)
        if sample.isnan().any():
            raise ValueError("broken")
        return sample


@pytest.mark.parametrize("count", [20, 50, 200, 400])
@pytest.mark.parametrize("sampler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_rows_are_the_samplers_own_steps(count: int, sampler: type) -> None:
    scheduler = sampler()
    scheduler.set_timesteps(count)
    clock = Clock(scheduler.timesteps.tolist())
    rows = [clock.rows_of(step)[0] for step in scheduler.timesteps]
    assert sorted(set(rows)) == list(range(len(set(scheduler.timesteps.tolist()))))
    assert all(clock.steps[row] == step for row, step in zip(rows, scheduler.timesteps.tolist(), strict=True))


def test_repeated_steps_share_a_row() -> None:
    clock = Clock([9, 4, 4, 1])
    assert clock.steps == (9, 4, 1)
    assert clock.rows_of(torch.tensor([1, 4, 9, 4])) == (2, 1, 0, 1)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(AerogelError, match="time step 5 is not among the 3 of DDIM"):
        Clock([9, 4, 1], "DDIM").rows_of(5)


def test_it_follows_a_forward_and_comes_off() -> None:
    clock = Clock([9, 4, 1])
    denoiser = Denoiser(clock)
    with clock.on(denoiser):
        denoiser(torch.zeros(2, 1), torch.tensor([4, 1]))
        denoiser(torch.zeros(1, 1), timestep=9)
        with pytest.raises(ValueError, match="broken"):
            denoiser(torch.full((1, 1), torch.nan), 4)
        with pytest.raises(AerogelError, match="outside"):
            _ = clock.rows
    assert denoiser.seen == [(1, 2), (0,), (1,)]
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks


def test_a_module_of_the_step_alone_gives_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    clock, linear = Clock([9, 4, 1]), nn.Linear(48, 96)
    module = PerRow(linear, clock)
    x_TC = torch.randn(3, 48)
    alone = [linear(x_TC[row : row + 1]) for row in range(3)]
    for rows in ((1, 1, 1, 1), (2, 0, 2), (0,), (1,) * 7):
        with clock.at(rows):
            y = module(x_TC[list(rows)])
        assert torch.equal(y, torch.cat([alone[row] for row in rows]))
    with clock.at((2, 2)):
        assert torch.equal(module(x_TC[2:]), alone[2]), "one row may stand for a batch"
