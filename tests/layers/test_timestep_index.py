"""The timestep index looks the row of a time step up, reads it from a denoiser's forwards, and refuses what it does not know."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.timestep_index import TimestepIndex


class Denoiser(nn.Module):
    def __init__(self, index: TimestepIndex) -> None:
        super().__init__()
        self.index = index
        self.seen: list[tuple[int, ...]] = []

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        self.seen.append(self.index.rows)
        if sample.isnan().any():
            raise ValueError("broken")
        return sample


@pytest.mark.parametrize("count", [20, 50, 200, 400])
@pytest.mark.parametrize("sampler", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_rows_are_the_samplers_own_steps(count: int, sampler: type) -> None:
    scheduler = sampler()
    scheduler.set_timesteps(count)
    index = TimestepIndex(scheduler.timesteps.tolist())
    rows = [index.rows_of(step)[0] for step in scheduler.timesteps]
    assert sorted(set(rows)) == list(range(len(set(scheduler.timesteps.tolist()))))
    assert all(index.steps[row] == step for row, step in zip(rows, scheduler.timesteps.tolist(), strict=True))


def test_repeated_steps_share_a_row() -> None:
    index = TimestepIndex([9, 4, 4, 1])
    assert index.steps == (9, 4, 1)
    assert index.rows_of(torch.tensor([1, 4, 9, 4])) == (2, 1, 0, 1)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(AerogelError, match="time step 5 is not among the 3 of DDIM"):
        TimestepIndex([9, 4, 1], "DDIM").rows_of(5)


def test_it_follows_a_forward_and_comes_off() -> None:
    index = TimestepIndex([9, 4, 1])
    denoiser = Denoiser(index)
    with index.on(denoiser):
        denoiser(torch.zeros(2, 1), torch.tensor([4, 1]))
        denoiser(torch.zeros(1, 1), timestep=9)
        with pytest.raises(ValueError, match="broken"):
            denoiser(torch.full((1, 1), torch.nan), 4)
        with pytest.raises(AerogelError, match="outside"):
            _ = index.rows
    assert denoiser.seen == [(1, 2), (0,), (1,)]
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks


class Projected(Denoiser):
    def __init__(self, index: TimestepIndex) -> None:
        super().__init__(index)
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 32))
        self.table = torch.randn(3, 48)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        rows = self.index.rows
        return sample + self.time(self.table[list(rows)].expand(len(sample), -1))


@pytest.mark.parametrize("steps", [(4, 4, 4, 4), (1, 9, 1), (9,)], ids=str)
def test_what_depends_on_the_step_alone_gives_the_same_bits_in_any_batch(steps: tuple[int, ...]) -> None:
    index = TimestepIndex([9, 4, 1])
    denoiser = Projected(index)
    alone = [denoiser.time(denoiser.table[row : row + 1]) for row in range(3)]
    sample = torch.zeros(len(steps), 32)
    with index.on(denoiser, ["time"]):
        batches = [torch.tensor(steps)] + ([torch.tensor(steps[0])] if len(set(steps)) == 1 else [])
        for timestep in batches:  # one step may stand for a batch
            y = denoiser(sample, timestep)
            wanted = torch.cat([alone[index.steps.index(step)] for step in steps])
            assert torch.equal(y, wanted) if len(set(steps)) == 1 else torch.allclose(y, wanted, atol=1e-6)
    assert not denoiser.time._forward_hooks


def test_a_module_that_fails_leaves_the_clock_in_order() -> None:
    index = TimestepIndex([9, 4, 1])
    denoiser = Projected(index)
    with index.on(denoiser, ["time"]):
        denoiser.table = torch.randn(3, 47)
        with pytest.raises(RuntimeError):
            denoiser(torch.zeros(2, 32), 4)
        denoiser.table = torch.randn(3, 48)
        assert denoiser(torch.zeros(2, 32), 4).shape == (2, 32)


def test_a_copy_follows_a_clock_of_its_own() -> None:
    index = TimestepIndex([9, 4, 1])
    denoiser = Projected(index)
    index.track(denoiser, ["time"])
    twin = copy.deepcopy(denoiser)
    assert twin.index is not index
    assert torch.equal(twin(torch.zeros(2, 32), 1), denoiser(torch.zeros(2, 32), 1))


def test_a_denoiser_that_it_left_is_followed_no_more_and_keeps_its_other_hooks() -> None:
    index, other = TimestepIndex([3, 1]), TimestepIndex([3, 1])
    denoiser = nn.Sequential(nn.Linear(2, 2))
    kept = {handle.id for handle in other.track(denoiser, ["0"])}
    index.track(denoiser, ["0"])
    index.untrack(denoiser)
    assert {key for part in denoiser.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks) for key in hooks} == kept
    other.untrack(denoiser)
    assert not any(hooks for part in denoiser.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks))
    assert denoiser(torch.ones(2, 2)).shape == (2, 2), "without a time step"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_another_dtype_has_the_row_of_the_nearest(dtype: torch.dtype) -> None:
    index = TimestepIndex([0.9937, 0.7412, 0.4123])
    assert index.rows_of(torch.tensor([0.4123, 0.9937], dtype=dtype)) == (2, 0)
    with pytest.raises(AerogelError, match="is not among the 3"):
        index.rows_of(torch.tensor([0.76], dtype=dtype))


def test_a_time_step_for_each_token_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"time steps of shape \(1, 4\), one for each token"):
        TimestepIndex([9, 4]).rows_of(torch.tensor([[9, 9, 0, 0]]))
