"""FSC: each step's range is exact, the error is within one step of the grid, and the network follows its clock, on disk too."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear, timestep_index_of
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.quantize import fake_quantize, grid_from_range
from aerogel.numerics.scheme import PerStep
from tests.data.test_denoising import unconditional
from tests.tiny import FAMILIES, output

STEPS = (980, 760, 300, 20)
RECIPE = {"name": "path", "steps": [{"tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 10}}, {"fsc": {}}]}


def calls(batch: int = 2) -> list[Call]:
    """One call a step, as a sampler makes them."""
    (call,) = FAMILIES["unet"].calls(1)
    inputs = {name: tensor[:1].repeat(batch, *[1] * (tensor.ndim - 1)) for name, tensor in call.kwargs.items()}
    return [Call((), inputs | {"timestep": torch.tensor(step)}) for step in STEPS]


def compressed() -> Network:
    return aerogel.compress(FAMILIES["unet"].build(), RECIPE, samples=calls(), measures=()).network


def inputs_of(layer: QuantLinear) -> torch.Tensor:
    grid = layer._buffers["input_scale"]
    assert grid is not None
    return grid


def given_by(network: Network, name: str, call: Call) -> torch.Tensor:
    """What a module gives in a forward."""
    caught: list[torch.Tensor] = []
    handle = network.module.get_submodule(name).register_forward_hook(lambda _, __, y: caught.append(y))
    network.run(call)
    handle.remove()
    return caught[0]


def test_each_range_is_that_of_the_input_at_the_step() -> None:
    network = compressed()
    path = time_path.find(network)
    first = path.embedding_linears["time_embedding.linear_1"]
    assert isinstance(first, QuantLinear)
    assert first.scheme.inputs is not None
    assert first.scheme.inputs.granularity == PerStep(len(STEPS))
    sinusoid_TC = time_path.sinusoids(network, path, calls()[0], STEPS)
    for row in range(len(STEPS)):
        wanted = grid_from_range(sinusoid_TC[row].min(), sinusoid_TC[row].max(), first.scheme.inputs)
        assert float(inputs_of(first)[row]) == pytest.approx(float(wanted.scale))
        assert first.timestep_index is not None
        with first.timestep_index.at((row,)):
            grid = first.input_grid()
        assert grid is not None
        error = fake_quantize(sinusoid_TC[row], grid, first.scheme.inputs) - sinusoid_TC[row]
        assert error.abs().max() <= grid.scale


def test_one_range_for_all_steps_is_never_finer() -> None:
    network = compressed()
    path, clock = time_path.find(network), timestep_index_of(network.module)
    assert clock is not None
    sinusoid_TC = time_path.sinusoids(network, path, calls()[0], STEPS)
    for name, layer in {**path.embedding_linears, **path.projections}.items():
        assert isinstance(layer, QuantLinear)
        assert layer.scheme.inputs is not None
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for row in range(len(STEPS)):
            with clock.at((row,)):
                path.features(sinusoid_TC[row : row + 1])
        handle.remove()
        together = torch.cat(seen)
        shared = grid_from_range(together.min(), together.max(), layer.scheme.inputs)
        assert (inputs_of(layer) <= shared.scale * (1 + 1e-6)).all(), name
    scales = {tuple(inputs_of(layer).tolist()) for layer in path.projections.values()}  # type: ignore[arg-type]
    assert len(scales) == 1, "all projections read one tensor"


def test_what_comes_out_is_the_same_in_every_batch() -> None:
    network = compressed()
    for call, larger in zip(calls(1), calls(5), strict=True):
        path = time_path.find(network)
        name = next(iter(path.projections))
        assert torch.equal(given_by(network, name, call).expand(5, -1), given_by(network, name, larger))


def test_a_batch_of_several_steps_gets_the_scales_of_each() -> None:
    network = compressed()
    mixed = Call((), calls(2)[0].kwargs | {"timestep": torch.tensor([STEPS[1], STEPS[3]])})
    together = output(network.module, mixed)
    apart = [output(network.module, calls(2)[row])[:1] for row in (1, 3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_another_step_is_refused_by_name() -> None:
    network = compressed()
    with pytest.raises(AerogelError, match="time step 981"):
        network.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(981)}))


def test_a_folder_follows_the_clock_too(tmp_path: Path) -> None:
    result = aerogel.compress(FAMILIES["unet"].build(), RECIPE, samples=calls(), measures=(), output=tmp_path / "out")
    reopened = aerogel.load(tmp_path / "out")
    for call in calls():
        assert torch.equal(output(reopened.module, call), output(result.network.module, call))
    with pytest.raises(AerogelError, match="time step 5"):
        reopened.run(Call((), calls()[0].kwargs | {"timestep": torch.tensor(5)}))


ALL = {
    "steps": [{"rtn": {"scheme": "W8A16_CHANNEL_ASYM", "targets": ["Linear", "Conv2d"]}}, {"fsc": {"scope": "all", "ignore": ["conv_out"]}}]
}


def test_all_layers_get_a_moving_average_a_step() -> None:
    twice = [*calls(), *(Call((), call.kwargs | {"sample": 3 * call.kwargs["sample"]}) for call in calls())]
    plain = aerogel.compress(FAMILIES["unet"].build(), {"steps": ALL["steps"][:1]}, samples=twice, measures=()).network
    network = aerogel.compress(FAMILIES["unet"].build(), ALL, samples=twice, measures=()).network
    layers = {name: part for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}
    assert [name for name, part in layers.items() if part.scheme.inputs is None] == ["conv_out"]
    first = layers["conv_in"]
    assert first.scheme.inputs is not None
    for row, (one, three) in enumerate(zip(twice[:4], twice[4:], strict=True)):
        low, high = (0.95 * edge(one.kwargs["sample"]) + 0.05 * edge(three.kwargs["sample"]) for edge in (torch.min, torch.max))
        wanted = grid_from_range(low, high, first.scheme.inputs)
        assert float(inputs_of(first)[row]) == pytest.approx(float(wanted.scale), rel=1e-5)
    for call in twice[:4]:
        wanted_N = output(plain.module, call)
        error = (output(network.module, call) - wanted_N).square().mean() / wanted_N.square().mean()
        assert 0 < error < 1e-2


def test_batches_of_several_steps_show_each_step_its_own_samples() -> None:
    mixed = [Call((), calls(2)[0].kwargs | {"timestep": torch.tensor(pair)}) for pair in (STEPS[:2], STEPS[2:])]
    network = aerogel.compress(FAMILIES["unet"].build(), ALL, samples=mixed, measures=()).network
    apart = [Call((), {**call.kwargs, "timestep": torch.tensor(step)}) for call, step in zip(calls(1), STEPS, strict=True)]
    layer = network.module.get_submodule("conv_in")
    alone = aerogel.compress(FAMILIES["unet"].build(), ALL, samples=apart, measures=()).network.module.get_submodule("conv_in")
    assert isinstance(layer, QuantLinear)
    assert isinstance(alone, QuantLinear)
    torch.testing.assert_close(inputs_of(layer), inputs_of(alone), rtol=1e-2, atol=0)


def test_float_weights_are_refused() -> None:
    with pytest.raises(AerogelError, match="put tiar, or rtn on its layers, before fsc"):
        aerogel.compress(FAMILIES["unet"].build(), {"steps": [{"fsc": {}}]}, samples=calls(), measures=())


def test_outside_of_its_denoiser_a_layer_says_so() -> None:
    layer = next(part for part in compressed().module.modules() if isinstance(part, QuantLinear))
    with pytest.raises(AerogelError, match="outside of its denoiser"):
        layer(torch.zeros(1, layer.in_features))
    layer.timestep_index = TimestepIndex([1])
    with pytest.raises(AerogelError, match="outside of its denoiser"):
        layer(torch.zeros(1, layer.in_features))


def test_another_sampler_is_refused_and_both_are_named(tmp_path: Path) -> None:
    pipeline = unconditional()
    pipeline.set_progress_bar_config(disable=True)
    recipe = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"fsc": {}}]}
    pipeline.save_pretrained(tmp_path / "source")
    aerogel.compress(tmp_path / "source", recipe, samples=Denoising(count=1, steps=4), measures=(), output=tmp_path / "out")
    opened = aerogel.load(tmp_path / "out", lazy=False)
    opened.processor.set_progress_bar_config(disable=True)
    opened.processor(num_inference_steps=4)
    with pytest.raises(AerogelError, match="one of the 5 steps of DDIMScheduler, is not among the 4 of DDIMScheduler"):
        opened.processor(num_inference_steps=5)
    opened.processor.scheduler = diffusers.DDIMParallelScheduler(timestep_spacing="trailing")
    with pytest.raises(AerogelError, match="one of the 4 steps of DDIMParallelScheduler, is not among the 4 of DDIMScheduler"):
        opened.processor(num_inference_steps=4)
