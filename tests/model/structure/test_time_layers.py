"""The path of the time step is found by following it: the layers that families name, with whatever else enters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.family import TimePath
from aerogel.model.structure.examples import Example
from aerogel.model.structure.time_layers import time_path_of
from tests.architectures.cases import cases
from tests.tiny import opened, output

DENOISERS = {case.name: case for case in cases() if case.kind == "denoiser"}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("unet", ()), ("pixart", ()), ("cogvideox", ()), ("dit", ("class_labels",)), ("sd3", ("pooled_projections",)),
        ("flux", ("pooled_projections", "guidance")),
    ],
)  # fmt: skip
def test_it_is_the_path_that_families_name(name: str, others: tuple[str, ...]) -> None:
    network = opened(name)
    known = network.family.time
    assert known is not None
    found = time_path_of(network.module, network._examples)
    assert found is not None
    assert set(found.embedders) == set(network.named(*known.embedders))
    assert set(found.projections) == set(network.named(*known.projections))
    assert set(found.always) == set(others)


class Denoiser(nn.Module):
    """A sinusoid of a kind, two layers, and two projections that an image is shifted by."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
        self.shift, self.more, self.image, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.mixed = mixed

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        timestep = timestep.expand(len(sample))
        embedded = self.embed(torch.stack([torch.sin(timestep * speed) for speed in (1.0, 0.1, 0.01, 0.001)], dim=-1))
        if label is not None:
            embedded = embedded + label
        if self.mixed:
            embedded = embedded + sample.mean()
        activated = nn.functional.silu(embedded)
        x = self.image(sample) + self.shift(activated)[:, None]
        moved: Tensor = self.out(nn.functional.gelu(x)) + self.more(activated)[:, None]
        return moved


def found_in(module: nn.Module, **more: Tensor) -> TimePath | None:
    call = Call((), {"sample": torch.randn(2, 5, 6), "timestep": torch.tensor([500, 40])} | more)
    return time_path_of(module.requires_grad_(False), [Example("", call)])


def test_layers_that_the_image_reaches_are_none_of_it() -> None:
    assert found_in(Denoiser()) == TimePath(("embed",), ("shift", "more"))
    assert found_in(Denoiser(), label=torch.randn(2, 8)) == TimePath(("embed",), ("shift", "more"), always=("label",))
    assert found_in(Denoiser(), timestep=torch.tensor(500)) == TimePath(("embed",), ("shift", "more")), "one step for all samples"
    assert found_in(Denoiser(mixed=True)) is None, "the image enters behind the embedder"


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "LTXVideoTransformer3DModel", "QwenImageTransformer2DModel"])
def test_denoisers_without_a_family_have_one(name: str) -> None:
    module = DENOISERS[name].make()
    network = open_model(module)
    network.discover(DENOISERS[name].calls(module))
    assert network.family.time is None
    path = time_path.find(network)
    path.require_alone()
    assert path.embedders
    assert path.projections


def test_a_step_that_is_embedded_in_several_places_is_refused() -> None:
    case = DENOISERS["LTX2VideoTransformer3DModel"]
    module = case.make()
    network = open_model(module)
    network.discover(case.calls(module))
    with pytest.raises(AerogelError, match="the time step is embedded in 6 places"):
        time_path.find(network).require_alone()


def test_methods_of_time_steps_work_on_a_denoiser_without_a_family(tmp_path: Path) -> None:
    """Its folder knows the path, which made-up inputs do not find: they do not say how high and wide an image is."""
    case = DENOISERS["QwenImageTransformer2DModel"]
    module = case.make()
    calls = case.calls(module)
    recipe = {"steps": [{"tiar": {"scheme": "W4A16_CHANNEL_ASYM", "steps": 5}}, {"fsc": {}}, {"temporal_cache": {}}]}
    result = aerogel.compress(module, recipe, samples=calls, measures=(), output=tmp_path / "out")
    path = time_path.find(result.network)
    assert path.projections
    assert all(isinstance(layer, QuantLinear) for layer in path.projections.values())
    opened_again = aerogel.load(tmp_path / "out", lazy=False)
    with policies.on(result.network, result.policies):
        for call in calls:
            assert torch.equal(output(opened_again.module, call), output(result.network.module, call))


def test_frames_are_no_samples() -> None:
    """Its projections read a row for each frame, and a table of steps would answer with one for each video."""
    with pytest.raises(AerogelError, match="no layer of this UNet3DConditionModel model reads the time step and no image"):
        time_path.find(open_model(DENOISERS["UNet3DConditionModel"].make()))
