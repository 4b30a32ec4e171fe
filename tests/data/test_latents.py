"""The latents behind each step are those of the pipeline's own sampler, and the time of denoising is that of the steps alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import diffusers
import pytest
import torch

from aerogel.data.denoising import Denoising, generate_images, record
from aerogel.data.latents import denoising_seconds, latents_by_step, watched_sampler
from aerogel.errors import AerogelError
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.replay import output_of, replays
from tests.runtime.feature_cache.test_replay import SAMPLERS, dit_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

WANTED = Denoising(count=3, steps=4, batch=2, guidance=3.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_they_are_where_a_replay_goes(sampler: str) -> None:
    network = dit_pipeline(sampler)
    made = list(latents_by_step(network.processor, WANTED, 5))
    runs = replays(network, Trajectories.of(network, record(network.processor, network.module, WANTED, 5)))
    assert [len(passed) for passed in made] == [4, 4]
    for passed, run in zip(made, runs, strict=True):
        state = run.start()
        for latents in passed:
            state = run.advance(state, output_of(network.run(run.call(state))))
            torch.testing.assert_close(latents[: len(state.x_BCHW)], state.x_BCHW, rtol=1e-3, atol=1e-3)


def test_a_sampler_with_two_calls_a_step_has_them_all() -> None:
    network = dit_pipeline()
    network.processor.scheduler = diffusers.HeunDiscreteScheduler()
    passed, _ = latents_by_step(network.processor, WANTED, 0)
    assert len(passed) == len(network.processor.scheduler.timesteps) == 7
    assert denoising_seconds(network.processor, network.module, WANTED, 0, iter(range(9)).__next__) == 2


def test_the_sampler_is_what_it_was() -> None:
    network = dit_pipeline()
    scheduler = network.processor.scheduler
    list(latents_by_step(network.processor, WANTED, 0))
    assert "step" not in scheduler.__dict__
    own = scheduler.step
    scheduler.step = own
    with pytest.raises(KeyboardInterrupt), watched_sampler(network.processor, lambda _: None):
        raise KeyboardInterrupt
    assert scheduler.__dict__["step"] is own


def test_only_the_time_of_the_steps_counts() -> None:
    """A clock that is moved by what happens outside of them too."""
    network = dit_pipeline()
    pipeline, time = network.processor, [0.0]

    def spend(much: float) -> Any:
        def hook(*_: Any) -> None:
            time[0] += much

        return hook

    pipeline.vae.decoder.register_forward_hook(spend(100))
    network.module.register_forward_hook(spend(1))
    taken = denoising_seconds(pipeline, network.module, WANTED, 0, lambda: time[0])
    assert taken == 4 * 2, "two batches of four steps"
    assert time[0] > 200
    assert not network.module._forward_pre_hooks
    list(generate_images(pipeline, WANTED, 0))


def test_steps_that_do_not_add_up_are_refused() -> None:
    network = dit_pipeline()
    scheduler = network.processor.scheduler
    own = scheduler.set_timesteps

    def longer(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        network.processor.scheduler = SAMPLERS["ddim"]()
        network.processor.scheduler.set_timesteps(9)

    scheduler.set_timesteps = longer
    with pytest.raises(AerogelError, match="DDIMScheduler has 9 time steps, but made another number of steps"):
        denoising_seconds(network.processor, network.module, replace(WANTED, count=2), 0, count().__next__)
