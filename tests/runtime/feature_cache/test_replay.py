"""Replayed generations are those of the pipeline, whatever sampler and guidance, and forks of them are other futures of one past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from aerogel.data.denoising import Denoising, record
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.replay import Replay, output_of, replays
from tests import image_pipelines
from tests.tiny import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

SAMPLERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim of v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="linspace"),
    "dpm solver": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


def dit_pipeline(sampler: str = "ddim", seed: int = 0) -> Network:
    pipeline = image_pipelines.classes(seed)
    pipeline.scheduler = SAMPLERS[sampler]()
    return open_model(pipeline)


def recorded(network: Network, **options: Any) -> list[Call]:
    return record(network.processor, network.module, Denoising(**{"count": 4, "steps": 5, "batch": 2, "guidance": 3.0} | options))


def whole(network: Network) -> Callable[[int, Call], Tensor]:
    return lambda _, call: output_of(network.run(call))


def last_of(network: Network, run: Replay) -> Tensor:
    """The last input of a recorded generation, one branch."""
    last: Tensor = run.calls[-1].kwargs[run.name]
    return last.chunk(2)[0] if run.halves else last


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_replay_goes_where_the_pipeline_went(sampler: str, guidance: float) -> None:
    network = dit_pipeline(sampler)
    runs = replays(network, Trajectories.of(network, recorded(network, guidance=guidance)))
    assert len(runs) == 2
    for run in runs:
        assert run.halves == (guidance > 1)
        assert run.guidance == pytest.approx(guidance if run.halves else 0.0, rel=1e-3)
        state = run.start()
        for step in range(4):
            assert state.step == step
            state = run.advance(state, output_of(network.run(run.call(state))))
        wanted = last_of(network, run)
        torch.testing.assert_close(run.call(state).kwargs[run.name][: len(wanted)], wanted, rtol=1e-3, atol=1e-3)


def test_a_pipeline_without_classes_replays_too() -> None:
    network = open_model(image_pipelines.unconditional())
    network.processor.scheduler = SAMPLERS["ddim"]()
    (run,) = replays(network, Trajectories.of(network, recorded(network, guidance=None, count=2)))
    assert (run.halves, run.name) == (False, "sample")


@pytest.mark.parametrize("sampler", ["ddim", "dpm solver"])
def test_a_fork_has_the_past_of_its_trajectory(sampler: str) -> None:
    """Also where the sampler remembers earlier steps."""
    network = dit_pipeline(sampler)
    run = replays(network, Trajectories.of(network, recorded(network)))[0]
    wanted = run.finish(run.start(), whole(network))
    state = run.start()
    for _ in range(2):
        state = run.advance(state, output_of(network.run(run.call(state))))
    fork = state.fork()
    other = run.finish(fork, lambda _, call: 2 * output_of(network.run(call)))
    assert torch.equal(run.finish(state, whole(network)), wanted)
    assert torch.equal(run.finish(fork, whole(network)), wanted)
    assert not torch.allclose(other, wanted)


def test_new_noise_depends_on_its_generator_alone() -> None:
    network = dit_pipeline()
    run = replays(network, Trajectories.of(network, recorded(network)))[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, third = (run.noise(torch.Generator().manual_seed(seed)).x_BCHW for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert first.shape == run.start().x_BCHW.shape


def packed(dtype: torch.dtype = torch.float32, shifts: bool = True) -> tuple[Network, list[Call]]:
    """A Flux pipeline, which tells its sampler sigmas and a shift by the image's size, and its denoiser thousandths of steps."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    sampler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifts, shift=1.0 if shifts else 3.0)
    denoiser = FAMILIES["flux"].build().to(dtype)
    pipeline = diffusers.FluxPipeline(sampler, vae.to(dtype), None, None, None, None, denoiser)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[Call] = []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
    for seed in (0, 1):
        pipeline(
            prompt_embeds=torch.randn(1, 7, 32, dtype=dtype), pooled_prompt_embeds=torch.randn(1, 32, dtype=dtype), height=16, width=16,
            num_inference_steps=5, output_type="latent", num_images_per_prompt=2, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    hook.remove()
    return open_model(pipeline), calls


def apart(calls: list[Call]) -> list[Call]:
    """Each call under guidance as two, one behind the other."""
    return [call.map(lambda x, half=half: x.chunk(2)[half] if x.ndim else x) for call in calls for half in (0, 1)]


def test_branches_of_guidance_in_calls_of_their_own_are_joined() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    whole_runs, runs = replays(network, Trajectories.of(network, calls)), replays(network, Trajectories.of(network, apart(calls)))
    assert [run.halves for run in runs] == [True, True]
    assert runs[0].guidance == pytest.approx(whole_runs[0].guidance)
    for one, other in zip(runs, whole_runs, strict=True):
        assert torch.equal(one.finish(one.start(), whole(network)), other.finish(other.start(), whole(network)))


def clips(guidance: float = 4.0) -> tuple[Network, list[Call]]:
    """A Wan pipeline, which calls its denoiser twice a step."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    sampler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    denoiser = FAMILIES["wan"].build()
    pipeline = diffusers.WanPipeline(None, None, vae, sampler, denoiser)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[Call] = []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
    for seed in (0, 1):
        pipeline(
            prompt_embeds=torch.randn(2, 7, 32), negative_prompt_embeds=torch.randn(2, 7, 32), height=32, width=32, num_frames=5,
            num_inference_steps=5, guidance_scale=guidance, output_type="latent", generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    hook.remove()
    return open_model(pipeline), calls


def test_clips_whose_branches_come_one_behind_the_other_replay() -> None:
    network, calls = clips()
    assert len(calls) == 20
    runs = replays(network, Trajectories.of(network, calls))
    assert len(runs) == 2
    assert all(run.halves and len(run.calls) == 5 for run in runs)
    assert runs[0].guidance == pytest.approx(4.0, rel=1e-3)
    state = runs[1].start()
    for first in calls[10::2]:
        torch.testing.assert_close(state.x_BCHW, first.kwargs["hidden_states"], rtol=1e-3, atol=1e-3)
        state = runs[1].advance(state, output_of(network.run(runs[1].call(state))))


def test_branches_of_other_lengths_are_refused() -> None:
    network, calls = clips()
    calls = [Call(call.args, call.kwargs | {"encoder_hidden_states": call.kwargs["encoder_hidden_states"][:, : 7 - place % 2]})
             for place, call in enumerate(calls)]  # fmt: skip
    with pytest.raises(AerogelError, match=r"calls of their own, with \(2, 7, 32\) and \(2, 6, 32\): pad their prompts"):
        replays(network, Trajectories.of(network, calls))


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_that_was_told_more_than_a_number_goes_on_as_it_was_left(dtype: torch.dtype, shifts: bool) -> None:
    network, calls = packed(dtype, shifts)
    before = network.processor.scheduler._step_index
    runs = replays(network, Trajectories.of(network, calls))
    assert [run.steps for run in runs] == [tuple(float(call.kwargs["timestep"][0]) for call in calls[:5])] * 2
    assert not runs[0].halves
    for run, recorded_calls in zip(runs, (calls[:5], calls[5:]), strict=True):
        state = run.start()
        for call in recorded_calls:
            torch.testing.assert_close(run.call(state).kwargs["hidden_states"], call.kwargs["hidden_states"], rtol=1e-2, atol=1e-2)
            state = run.advance(state, output_of(network.run(run.call(state))))
    assert network.processor.scheduler._step_index == before


def test_a_sampler_that_was_set_anew_since_is_refused() -> None:
    network, calls = packed()
    network.processor.scheduler.set_timesteps(4, mu=0.5)
    with pytest.raises(AerogelError, match=r"cannot be set to 5 steps by their number alone .*mu.*not replayed"):
        replays(network, Trajectories.of(network, calls))


def test_a_sampler_that_draws_noise_is_refused() -> None:
    network = dit_pipeline()
    network.processor.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    with pytest.raises(AerogelError, match=r"does not replay: at step 2 of 5 .*DDPMScheduler may draw noise"):
        replays(network, Trajectories.of(network, recorded(network)))


def test_a_pipeline_that_does_something_else_is_refused() -> None:
    """diffusers' DiTPipeline steps from the input that Euler's sampler scaled for the denoiser, not from the sample."""
    network = dit_pipeline()
    network.processor.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(AerogelError, match=r"does not replay: .*or the pipeline do more than classifier-free guidance"):
        replays(network, Trajectories.of(network, recorded(network)))


def test_a_sampler_with_two_calls_a_step_is_refused() -> None:
    network = dit_pipeline()
    network.processor.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(AerogelError, match="samplers that call the denoiser several times a step do not serve"):
        replays(network, Trajectories.of(network, recorded(network)))


def test_calls_that_are_no_generation_are_refused() -> None:
    network = dit_pipeline()
    calls = recorded(network)
    with pytest.raises(AerogelError, match="9 recorded calls are not generations of 5 steps"):
        replays(network, Trajectories.of(network, calls[:-1]))
    with pytest.raises(AerogelError, match="1 recorded calls are not generations of 1 steps"):
        replays(network, Trajectories.of(network, calls[:1]))
    with pytest.raises(AerogelError, match="came without its pipeline"):
        replays(Network(network.module, network.family), Trajectories.of(Network(network.module, network.family), calls))
    network.processor.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    with pytest.raises(AerogelError, match="has other steps than the 5 recorded ones from step 1 on"):
        replays(network, Trajectories.of(network, calls))
