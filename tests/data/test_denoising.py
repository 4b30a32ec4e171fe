"""What is recorded are the calls of the real sampler, guidance included; equal tensors are kept once; nothing of the pipeline changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import aerogel
from aerogel import catalog
from aerogel.data.denoising import Denoising, check, first_call, generate_images, record
from aerogel.engine.calibration import CalibrationRequest, Samples, shown
from aerogel.errors import AerogelError
from aerogel.model.calls import tensors_in
from aerogel.model.family import Family
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from tests.image_pipelines import classes, unconditional
from tests.runtime.feature_cache.test_replay import dit_pipeline
from tests.tiny import FAMILIES


def test_every_step_and_branch_of_one_pass() -> None:
    pipeline = classes()
    calls = record(pipeline, pipeline.transformer, Denoising(count=3, steps=4, guidance=2.0, batch=2))
    assert len(calls) == 2 * 4
    pipeline.scheduler.set_timesteps(4)
    assert Trajectories(pipeline.transformer, "", tuple(calls)).steps == tuple(float(step) for step in pipeline.scheduler.timesteps)
    assert calls[0].kwargs["class_labels"].tolist() == [0, 7, 1000, 1000]
    assert calls[4].kwargs["class_labels"].tolist() == [0, 1000], "the third image is of the first class again"


def test_calls_are_those_of_a_run_by_hand() -> None:
    pipeline = classes()
    calls = record(pipeline, pipeline.transformer, Denoising(count=2, steps=3, guidance=2.0, batch=2), seed=5)
    answers = [pipeline.transformer(*call.args, **call.kwargs).sample for call in calls]
    sample = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5 * 1_000_003 + number)) for number in range(2)])
    pipeline.scheduler.set_timesteps(3)
    for call, answer, step in zip(calls, answers, pipeline.scheduler.timesteps, strict=True):
        torch.testing.assert_close(call.args[0], sample.repeat(2, 1, 1, 1))
        with_class, without = answer.chunk(2)
        sample = pipeline.scheduler.step(without + 2 * (with_class - without), step, sample).prev_sample


def test_equal_tensors_are_kept_once() -> None:
    pipeline = classes()
    calls = record(pipeline, pipeline.transformer, Denoising(count=2, steps=3, batch=2))
    labels = [call.kwargs["class_labels"] for call in calls]
    assert all(label is labels[0] for label in labels)
    assert len({call.args[0].data_ptr() for call in calls}) == 3


def test_pictures_are_those_that_calls_are_recorded_of() -> None:
    pipeline = classes()
    seen: list[Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made = list(generate_images(pipeline, Denoising(count=3, steps=2, batch=2), seed=5))
    hook.remove()
    calls = record(pipeline, pipeline.transformer, Denoising(count=3, steps=2, batch=2), seed=5)
    for ours, theirs in zip(seen, calls, strict=True):
        torch.testing.assert_close(ours, first(theirs))
    assert [batch.subjects for batch in made] == [("cat", "dog"), ("cat",)]
    generator = [torch.Generator().manual_seed(5 * 1_000_003 + number) for number in range(2)]
    by_hand = pipeline([0, 7], num_inference_steps=2, generator=generator, output_type="np").images
    torch.testing.assert_close(made[0].images_NCHW, torch.from_numpy(by_hand).permute(0, 3, 1, 2))


def test_pictures_of_an_unconditional_pipeline_have_no_subject() -> None:
    (made,) = generate_images(unconditional(), Denoising(count=2, steps=2))
    assert made.images_NCHW.shape == (2, 3, 8, 8)
    assert 0 <= made.images_NCHW.min() < made.images_NCHW.max() <= 1
    assert made.subjects == ()


def test_pictures_without_a_subject() -> None:
    pipeline = unconditional()
    before = dict(pipeline.unet.state_dict())
    calls = record(pipeline, pipeline.unet, Denoising(count=3, steps=2, batch=2))
    assert [len(first(call)) for call in calls] == [2, 2, 1, 1]
    assert not pipeline.unet._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())


def first(call: Any) -> Tensor:
    tensor: Tensor = call.args[0]
    return tensor


def test_guidance_of_a_pipeline_that_has_none_is_refused() -> None:
    pipeline = unconditional()
    with pytest.raises(AerogelError, match="knows no guidance"):
        record(pipeline, pipeline.unet, Denoising(guidance=2.0))


def test_a_value_that_only_the_sampling_minds_is_one_line() -> None:
    pipeline = classes()
    pipeline.scheduler.register_to_config(prediction_type={"x": 1})
    with pytest.raises(AerogelError, match=r"DiTPipeline fails \(ValueError: prediction_type given as .*scheduler, fetch it again"):
        record(pipeline, pipeline.transformer, Denoising(count=1, steps=2))


def test_prompts_are_asked_for() -> None:
    class Painter:
        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(AerogelError, match="Painter makes images of prompts"):
        record(Painter(), torch.nn.Identity(), Denoising())


@pytest.mark.parametrize(("pipeline", "made"), [(classes, "of classes"), (unconditional, "without being asked for anything")])
def test_prompts_that_a_pipeline_does_not_take_are_refused_by_the_plan_too(pipeline: Any, made: str) -> None:
    message = f"takes no prompts, it makes images {made}; leave the prompts out"
    with pytest.raises(AerogelError, match=message):
        check(pipeline(), Denoising(prompts=("a boot",)))
    network = aerogel.load(pipeline())
    for command in (aerogel.plan, aerogel.compress):
        with pytest.raises(AerogelError, match=message):
            command(network, {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}, samples=Denoising(2, 2, prompts=("a boot",)))
    with pytest.raises(AerogelError, match="knows no num_frames; leave it out"):
        aerogel.plan(network, {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}, samples=Denoising(2, 2, num_frames=5))


def test_a_pipeline_is_compressed_from_its_own_pictures() -> None:
    pipeline = classes()
    wanted = Denoising(count=2, steps=2, batch=2)
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}
    result = aerogel.compress(pipeline, recipe, samples=wanted, measures=())
    assert result.facts["provenance"]["calibration"]["sampler"] == "DDIMScheduler"
    assert result.facts["provenance"]["calibration"]["steps"] == 2


def test_a_denoiser_without_its_pipeline_says_so() -> None:
    with pytest.raises(AerogelError, match="came without its pipeline"):
        aerogel.compress(FAMILIES["dit"].build(), {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}, measures=())


def test_what_is_asked_becomes_pictures_or_text(tmp_path: Path) -> None:
    images = Network(FAMILIES["unet"].build(), catalog.find("families", "unet"))
    words = Network(FAMILIES["llama"].build(), Family("llama", ("llama",)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boot\n\na bag \n")
    asked = CalibrationRequest(source=str(prompts), count=3, steps=7, guidance=1.5)
    assert asked.shown(images) == Denoising(count=3, steps=7, guidance=1.5, prompts=("a boot", "a bag"))
    assert CalibrationRequest(count=5, length=9).shown(words) == Samples(count=5, length=9)
    assert shown(images, None) == Denoising()
    assert shown(words, None) == Samples(length=128)
    with pytest.raises(AerogelError, match="steps does not apply to a language model"):
        asked.shown(words)
    with pytest.raises(AerogelError, match="length does not apply to a diffusion model"):
        CalibrationRequest(length=9).shown(images)
    with pytest.raises(AerogelError, match="column is 'body', but no file with prompts is given as data"):
        CalibrationRequest(column="body").shown(images)
    prompts.write_text("\n")
    with pytest.raises(AerogelError, match="no prompt found"):
        asked.shown(images)
    with pytest.raises(AerogelError, match="no text source"):
        CalibrationRequest(source=str(tmp_path / "absent.txt")).shown(images)


def test_opening_a_pipeline_is_quiet_and_leaves_the_bars_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unconditional().save_pretrained(tmp_path / "pipeline")
    capfd.readouterr()
    aerogel.load(tmp_path / "pipeline")
    assert capfd.readouterr().err == ""
    assert diffusers.utils.logging.is_progress_bar_enabled()


def test_the_first_call_is_that_of_a_generation_and_nothing_is_computed() -> None:
    network = dit_pipeline()
    (first, *_) = record(network.processor, network.module, Denoising(count=1, steps=3, batch=1), seed=5)
    ran: list[object] = []
    handle = network.module.get_submodule("transformer_blocks.0").register_forward_pre_hook(lambda *_: ran.append(_))
    found = first_call(network.processor, network.module, Denoising(count=4, steps=3, batch=2), seed=5)
    handle.remove()
    assert not ran
    assert found.kwargs.keys() == first.kwargs.keys()
    pairs = zip(tensors_in((found.args, found.kwargs)), tensors_in((first.args, first.kwargs)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("module", "raised"), [("aerogel.model.walk", ZeroDivisionError), ("diffusers.schedulers", AerogelError)])
def test_only_what_the_pipeline_raises_is_blamed_on_it(module: str, raised: type[Exception]) -> None:
    pipeline, code = classes(), {"__name__": module}
    exec("def fail(*_):\n    1 / 0", code)
    with temporary_hooks([pipeline.transformer.register_forward_pre_hook(code["fail"])]), pytest.raises(raised, match="division by zero"):
        record(pipeline, pipeline.transformer, Denoising(count=1, steps=1, batch=1))
