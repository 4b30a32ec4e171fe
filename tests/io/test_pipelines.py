"""diffusers opens what was saved here, alone and in its pipeline, with the same answers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import aerogel
from aerogel.io.pipelines import register_diffusers
from aerogel.layers.linear import QuantLinear
from tests.methods.diffusion.test_fsc import RECIPE, calls
from tests.tiny import FAMILIES, output

ROUND = {"steps": [{"rtn": {"scheme": "W4A16_CHANNEL_ASYM", "targets": ["Linear", "Conv2d"]}}]}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_diffusers()


@pytest.mark.parametrize("recipe", [ROUND, RECIPE], ids=["weights", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_denoiser(recipe: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=(), output=tmp_path / "out")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", torch_dtype=dtype).eval()
    ours = aerogel.load(tmp_path / "out", dtype=dtype).module
    assert any(isinstance(part, QuantLinear) for part in theirs.modules())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert theirs.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(theirs.state_dict()[name], tensor), name
    if dtype == torch.float32:
        for call in calls():
            assert torch.equal(output(theirs, call), output(ours, call))


def test_a_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler())
    aerogel.compress(pipeline, ROUND, measures=(), output=tmp_path / "out")
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert any(isinstance(part, QuantLinear) for part in opened.unet.modules())
    images = [one(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images for one in (pipeline, opened)]
    assert (images[0] == images[1]).all()
