"""transformers and diffusers open what was saved here with our layers, alone and in a pipeline, with the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from tests.architectures.cases import cases
from tests.io.test_packed_words import as_before
from tests.methods.diffusion.test_fsc import RECIPE, calls
from tests.registration import registered, registrations_undone
from tests.saved import network, save
from tests.tiny import FAMILIES, output

ROUND = {"steps": [{"rtn": {"scheme": "W4A16_CHANNEL_ASYM", "targets": ["Linear", "Conv2d"]}}]}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


@pytest.mark.parametrize(
    ("name", "scheme", "dtype"),
    [
        ("llama", "FP8_DYNAMIC", torch.bfloat16),
        ("gemma3", "W4A16_G32", torch.float32),
        ("qwen3_moe", "W4A16_G32_ASYM", torch.float32),
        ("mixtral", "W8A8", torch.bfloat16),
        ("gpt_oss", "W4A16_G32_ASYM", torch.float32),
    ],
    ids=str,
)
def test_a_language_model(name: str, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    recipe = {"name": "rounded", "steps": [{"rtn": {"scheme": scheme}}]}
    aerogel.compress(tiny.build(), recipe, samples=tiny.calls(1), output=tmp_path / "out", measures=())
    same_answers(tmp_path / "out", tiny.calls(2), dtype)


def same_answers(folder: Path, calls: list[Any], dtype: torch.dtype) -> None:
    """Compare what transformers opens with what aerogel does, tensor by tensor and answer by answer."""
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading.values())
    ours = aerogel.load(folder, dtype=dtype, lazy=False).module
    assert any(isinstance(part, QuantLinear) for part in theirs.modules())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert theirs.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(theirs.state_dict()[name], tensor), name
    for call in calls:
        assert torch.equal(output(theirs.eval(), call), output(ours, call))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_some_layers_only(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    network = aerogel.load(tiny.build())
    first = next(iter(network.blocks()))
    recipe = {"name": "one-block", "steps": [{"rtn": {"scheme": "W4A16_G32", "targets": [f"re:{first}\\..*experts.*"]}}]}
    aerogel.compress(network, recipe, samples=tiny.calls(1), output=tmp_path / "out", measures=())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for call in tiny.calls(2):
        torch.testing.assert_close(output(theirs, call), output(network.module, call), rtol=0, atol=1e-5)


def test_layers_that_compressed_tensors_cannot_describe(tmp_path: Path) -> None:
    case = next(case for case in cases() if str(case) == "causal-gpt_neox")  # no scale passes a GELU
    recipe = {"name": "scaled", "steps": [{"awq": {"scheme": "W4A16_G32", "unmapped": "keep"}}]}
    module = case.make()
    calls = case.calls(module)
    aerogel.compress(module, recipe, samples=calls, output=tmp_path / "out", measures=())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "aerogel"
    same_answers(tmp_path / "out", calls, torch.float32)


def test_transformers_does_not_save_codes_without_their_configuration(tmp_path: Path) -> None:
    tiny = FAMILIES["llama"]
    aerogel.compress(
        tiny.build(), {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, samples=tiny.calls(1), output=tmp_path / "out", measures=()
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        theirs.save_pretrained(tmp_path / "again")


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


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_a_denoiser_with_tensors_at_its_root(name: str, tmp_path: Path) -> None:
    module, (call,) = FAMILIES[name].build(), FAMILIES[name].calls(1)
    assert "scale_shift_table" in dict(module.named_parameters())
    kind: Any = type(module)
    result = aerogel.compress(module, {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, measures=(), output=tmp_path / "out")
    again = kind.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(again, call), output(result.network.module, call))


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


def test_integer_codes_packed_as_before_are_refused(tmp_path: Path) -> None:
    for name in ("now", "before"):
        save(network("W3A16_G32"), tmp_path / name)
    as_before(tmp_path / "before", 3)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "now")
    with pytest.raises(AerogelError, match=r"3-bit integer codes, packed as before compressed-tensors 0\.18\.0; write the folder anew"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "before")


def test_what_a_test_registers_is_gone_after_it() -> None:
    """Else the tests that expect a library by itself depend on those before them in the same process."""
    from diffusers.quantizers import auto as of_diffusers
    from transformers.quantizers import auto as of_transformers

    mappings = [
        each for auto in (of_diffusers, of_transformers) for each in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    ]
    for mapping in mappings:
        del mapping["aerogel"]  # of this module's own fixture
    with registrations_undone():
        aerogel.register_transformers()
        aerogel.register_diffusers()
        assert all("aerogel" in mapping for mapping in mappings)
    assert not any("aerogel" in mapping for mapping in mappings)
