"""The ModelOpt layout: weights recovered literally from its tensors, its two configurations, and what it refuses."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine.exporting import export, source_of
from aerogel.errors import AerogelError
from aerogel.export.modelopt import ModelOpt
from aerogel.layers.linear import QuantLinear
from aerogel.layers.scaled_input import ScaledInput
from tests.folders import model_folder
from tests.image_pipelines import classes
from tests.saved import SchemeOf, network, save
from tests.tiny import FAMILIES

Q_PROJ = "model.layers.0.self_attn.q_proj"
ALGORITHMS = {"FP8_STATIC": "FP8", "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4A16": "W4A16_NVFP4"}
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def exported(folder: Path, **options: int) -> dict[str, Tensor]:
    ModelOpt(**options).write(source_of(folder), folder.parent / "modelopt")
    return load_file(folder.parent / "modelopt/model.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["FP8_STATIC", "FP8_DYNAMIC"])
def test_every_float8_weight_comes_back_bit_for_bit(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = network(scheme, dtype=dtype)
    save(given, tmp_path / "master")
    tensors = exported(tmp_path / "master")
    for name, linear in given.module.named_modules():
        if isinstance(linear, QuantLinear):
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert tuple(scale.shape) == ((len(weight),) if scheme == "FP8_DYNAMIC" else ())
            rows = [[float(value) for value in row] for row in weight.float()]
            scales = scale.expand(len(weight)).double().tolist()
            literal = torch.tensor([[value * scale for value in row] for row, scale in zip(rows, scales, strict=True)])
            assert literal.equal(linear.dequantized(torch.float32)), name
    floats = {name: tensor for name, tensor in given.module.state_dict().items() if "proj" not in name}
    assert all(tensors[name].equal(tensor) for name, tensor in floats.items())
    inputs = {name: tensor for name, tensor in tensors.items() if name.endswith(".input_scale")}
    assert len(inputs) == (14 if scheme == "FP8_STATIC" else 0)
    assert all(tensor.shape == () and tensor.dtype == torch.float32 and float(tensor) == 0.03125 for tensor in inputs.values())
    assert len(tensors) == len(floats) + 2 * 14 + len(inputs)


def block_folder(tmp_path: Path, kind: str = "llama", **sizes: int) -> Path:
    """A folder in FP8_BLOCK, of a model whose layers have whole blocks only."""
    wide = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, **sizes}
    model = model_folder(tmp_path / "model", kind, num_hidden_layers=1, dtype=torch.bfloat16, **wide)
    recipe = {"name": "modelopt", "steps": [{"rtn": {"scheme": "FP8_BLOCK"}}]}
    aerogel.compress(model, recipe, output=tmp_path / "master", measures=())
    return tmp_path / "master"


def test_float8_blocks_have_scales_in_four_dimensions(tmp_path: Path) -> None:
    folder = block_folder(tmp_path)
    module, tensors = aerogel.load(folder, lazy=False).module, exported(folder)
    for name, linear in module.named_modules():
        if isinstance(linear, QuantLinear):
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            rows, columns = weight.shape[0] // 128, weight.shape[1] // 128
            assert (weight.dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.float32, (rows, 1, columns, 1))
            blocks = weight.float().view(rows, 128, columns, 128) * scale
            assert blocks.view(weight.shape).equal(linear.dequantized(torch.float32)), name
    assert sum(isinstance(part, QuantLinear) for part in module.modules()) == 7
    inner, told = read_json(tmp_path / "modelopt/config.json"), read_json(tmp_path / "modelopt/hf_quant_config.json")
    assert inner["quantization_config"]["quant_algo"] == told["quantization"]["quant_algo"] == "FP8_PB_WO"
    assert "config_groups" not in inner["quantization_config"]


def test_experts_in_float8_blocks_are_refused(tmp_path: Path) -> None:
    (reason,) = ModelOpt().refuse(source_of(block_folder(tmp_path, "mixtral")))
    assert reason.endswith("readers of this format take experts in FP8_STATIC or NVFP4A16, not in FP8_BLOCK")


def test_fp4_values_and_scales_come_back(tmp_path: Path) -> None:
    given = network("NVFP4A16", dtype=torch.bfloat16)
    save(given, tmp_path / "master")
    before, tensors = load_file(tmp_path / "master/model.safetensors"), exported(tmp_path / "master")
    linear = given.module.get_submodule(Q_PROJ)
    assert isinstance(linear, QuantLinear)
    packed, scale, outer = (tensors[f"{Q_PROJ}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    assert (packed.dtype, scale.dtype, outer.dtype, tuple(outer.shape)) == (torch.uint8, torch.float8_e4m3fn, torch.float32, ())
    assert float(outer) == float(1 / before[f"{Q_PROJ}.weight_global_scale"])
    rows = []
    for row, scales in zip(packed.tolist(), scale.float().tolist(), strict=True):
        codes = [code for byte in row for code in (byte & 15, byte >> 4)]
        values = [LEVELS[code & 7] * (-1 if code & 8 else 1) for code in codes]
        rows.append([value * scales[column // 16] * float(outer) for column, value in enumerate(values)])
    # The master's global scale is a divisor; its reciprocal in float32, which engines compute too, is half a step off at most.
    torch.testing.assert_close(torch.tensor(rows), linear.dequantized(torch.float32), rtol=2e-7, atol=0)


@pytest.mark.parametrize("scheme", ALGORITHMS)
def test_both_configurations_say_the_same(scheme: str, tmp_path: Path) -> None:
    save(network(lambda name: scheme if "proj" in name and "layers.0.mlp" not in name else None, dtype=torch.bfloat16), tmp_path / "master")
    exported(tmp_path / "master")
    inner = read_json(tmp_path / "modelopt/config.json")["quantization_config"]
    told = read_json(tmp_path / "modelopt/hf_quant_config.json")
    skipped = ["model.embed_tokens", *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")), "lm_head"]
    sized = {"group_size": 16} if scheme == "NVFP4A16" else {}
    expected = {"quant_algo": ALGORITHMS[scheme], "kv_cache_quant_algo": None, "exclude_modules": skipped, **sized}
    assert told["quantization"] == expected
    assert told["producer"] == inner["producer"] == {"name": "modelopt", "version": f"aerogel-{aerogel.__version__}"}
    assert (inner["quant_method"], inner["quant_algo"], inner["ignore"]) == ("modelopt", ALGORITHMS[scheme], skipped)
    group = inner["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["num_bits"] == (4 if sized else 8)
    assert group.get("input_activations", {}).get("dynamic") == {"FP8_STATIC": False, "FP8_DYNAMIC": True}.get(scheme)


def test_a_head_that_is_tied_to_the_embeddings_is_skipped_by_name(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", "gemma2", dtype=torch.bfloat16)
    recipe = {"name": "modelopt", "steps": [{"rtn": {"scheme": "FP8_DYNAMIC"}}]}
    aerogel.compress(tmp_path / "model", recipe, output=tmp_path / "master", measures=())
    assert "lm_head.weight" not in exported(tmp_path / "master")
    # vLLM takes a head that is not named for a quantized one.
    assert read_json(tmp_path / "modelopt/config.json")["quantization_config"]["ignore"] == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("granularity", ["tensor", "attn_head"])
def test_scales_of_the_cache_come_along_where_there_is_one_per_tensor(granularity: str, tmp_path: Path) -> None:
    recipe = {"steps": [{"rtn": {"scheme": "FP8_DYNAMIC"}}, {"kv_cache_fp8": {"granularity": granularity}}]}
    model_folder(tmp_path / "model", dtype=torch.bfloat16)
    aerogel.compress(tmp_path / "model", recipe, samples=FAMILIES["llama"].calls(1), output=tmp_path / "master", measures=())
    kept = granularity == "tensor"
    with nullcontext() if kept else pytest.warns(UserWarning, match="runs without kv_cache_fp8, which modelopt has no place for"):
        export(tmp_path / "master", "modelopt", tmp_path / "modelopt")
    before, after = load_file(tmp_path / "master/model.safetensors"), load_file(tmp_path / "modelopt/model.safetensors")
    found = {name: float(tensor) for name, tensor in after.items() if name.endswith((".k_scale", ".v_scale"))}
    attentions = {name.removesuffix(".k_scale") for name in before if name.endswith(".k_scale")}
    assert len(attentions) == 2
    expected = {f"{name}.{part}_proj.{part}_scale": before[f"{name}.{part}_scale"] for name in attentions for part in ("k", "v")}
    assert found == ({name: float(scale) for name, scale in expected.items()} if kept else {})
    told = read_json(tmp_path / "modelopt/hf_quant_config.json")["quantization"]["kv_cache_quant_algo"]
    scheme = read_json(tmp_path / "modelopt/config.json")["quantization_config"].get("kv_cache_scheme")
    assert (told, scheme) == (("FP8", {"num_bits": 8, "type": "float", "dynamic": False}) if kept else (None, None))


def test_shards_and_bytes_of_the_master_stay(tmp_path: Path) -> None:
    save(network("FP8_STATIC"), tmp_path / "master")
    before = {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()}
    ModelOpt(max_shard_size=20_000).write(source_of(tmp_path / "master"), tmp_path / "modelopt")
    assert len(list((tmp_path / "modelopt").glob("model-*.safetensors"))) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()} == before


def compressed_pipeline(folder: Path, scheme: str) -> Path:
    classes().save_pretrained(folder / "pipeline")
    recipe = {"name": "modelopt", "steps": [{"rtn": {"scheme": scheme}}]}
    aerogel.compress(str(folder / "pipeline"), recipe, output=folder / "master", samples=Denoising(2, 2, 2), measures=())
    return folder / "master"


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "FP8_DYNAMIC"])
def test_a_pipeline_gets_a_folder_of_its_denoiser(scheme: str, tmp_path: Path) -> None:
    master = compressed_pipeline(tmp_path, scheme)
    ModelOpt().write(source_of(master), tmp_path / "modelopt")
    made = {str(path.relative_to(tmp_path / "modelopt")) for path in (tmp_path / "modelopt").rglob("*") if path.is_file()}
    source = {str(path.relative_to(master)) for path in master.rglob("*") if path.is_file()}
    assert made == {name for name in source if not name.startswith(("aerogel", "report"))}
    for name in ("model_index.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "modelopt" / name).read_bytes() == (master / name).read_bytes()
    config = read_json(tmp_path / "modelopt/transformer/config.json")["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", ALGORITHMS[scheme])
    before = load_file(master / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "modelopt/transformer/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    layers = [name.removesuffix(".weight_scale") for name in before if name.endswith(".weight_scale")]
    assert layers
    assert not set(layers) & set(config["ignore"])
    for name in layers:
        assert after[f"{name}.weight_scale"].dtype == torch.float32
        assert after[f"{name}.weight_scale"].flatten().equal(before[f"{name}.weight_scale"].float().flatten())
        assert after[f"{name}.weight"].view(torch.uint8).equal(before[f"{name}.weight"].view(torch.uint8))
    assert (f"{layers[0]}.input_scale" in after) == (scheme == "FP8_STATIC")


def test_the_sub_folder_alone_is_exported_too(tmp_path: Path) -> None:
    master = compressed_pipeline(tmp_path, "FP8_STATIC") / "transformer"
    ModelOpt().write(source_of(master), tmp_path / "modelopt")
    assert {path.name for path in (tmp_path / "modelopt").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_what_readers_would_skip_too_is_refused(tmp_path: Path) -> None:
    save(network(lambda name: None if name == "proj_out" else "FP8_DYNAMIC", kind="flux"), tmp_path / "master")
    (reason,) = ModelOpt().refuse(source_of(tmp_path / "master"))
    assert reason == (
        "proj_out is not quantized, and readers would skip single_transformer_blocks.0.proj_out too, whose name contains it; "
        "quantize both or neither"
    )


def test_denoisers_have_float8_only_and_are_transformers(tmp_path: Path) -> None:
    reasons = ModelOpt().refuse(source_of(compressed_pipeline(tmp_path, "NVFP4A16")))
    assert all(reason.endswith("for diffusion transformers: FP8_STATIC, FP8_DYNAMIC") for reason in reasons)
    assert reasons
    save(network("FP8_DYNAMIC", kind="unet"), tmp_path / "unet")
    (reason,) = ModelOpt().refuse(source_of(tmp_path / "unet"))
    assert reason == "engines that read this format run diffusion transformers, not UNet2DConditionModel"


def _only(scheme: str, *parts: str) -> SchemeOf:
    return lambda name: scheme if name.endswith(parts) else None


REFUSED: dict[str, tuple[SchemeOf | str | None, str]] = {
    "integers": ("W8A8", "is none of the schemes that this format has for language models: FP8_STATIC, FP8_DYNAMIC, FP8_BLOCK, NVFP4A16"),
    "4 bits": ("W4A16_G32", "is none of the schemes"),
    "mx": ("MXFP4A16", "is none of the schemes"),
    "nothing": (None, "no linear layer in it is quantized"),
    "several": (
        lambda name: f"FP8_{'STATIC' if 'mlp' in name else 'DYNAMIC'}" if "proj" in name else None,
        "several schemes (FP8_DYNAMIC, F",
    ),
    "part of a set": (_only("FP8_STATIC", "gate_proj"), "gate_proj is quantized and model.layers.0.mlp.up_proj is not"),
    "head": (_only("FP8_STATIC", "proj", "lm_head"), "lm_head is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_say_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    scheme, words = REFUSED[case]
    save(network(scheme), tmp_path / "master")
    reasons = ModelOpt().refuse(source_of(tmp_path / "master"))
    assert reasons
    assert all(words in reason or "is quantized and" in reason for reason in reasons), reasons
    with pytest.raises(AerogelError, match="cannot be written as ModelOpt: ") as raised:
        ModelOpt().write(source_of(tmp_path / "master"), tmp_path / "modelopt")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "modelopt").exists()


def test_scaled_inputs_are_refused(tmp_path: Path) -> None:
    given = network("FP8_STATIC")
    inner = given.module.get_submodule(Q_PROJ)
    assert isinstance(inner, QuantLinear)
    given.module.set_submodule(Q_PROJ, ScaledInput(inner, torch.ones(inner.in_features)))
    save(given, tmp_path / "master")
    assert ModelOpt().refuse(source_of(tmp_path / "master")) == [f"{Q_PROJ} divides its input by a scale for each channel"]


def test_vision_towers_that_vllm_leaves_in_16_bits_are_refused(tmp_path: Path) -> None:
    save(network(lambda name: None if "lm_head" in name else "FP8_DYNAMIC", kind="llava"), tmp_path / "master")
    (reason,) = ModelOpt().refuse(source_of(tmp_path / "master"))
    assert reason.endswith("is quantized, and vLLM takes all layers under vision_tower for 16-bit ones")


def test_experts_have_one_scale_each(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    for scheme in ("FP8_DYNAMIC", "NVFP4A16"):
        recipe = {"name": "modelopt", "steps": [{"rtn": {"scheme": scheme}}]}
        aerogel.compress(tmp_path / "model", recipe, output=tmp_path / scheme / "master", measures=())
    (reason,) = ModelOpt().refuse(source_of(tmp_path / "FP8_DYNAMIC/master"))
    assert reason.endswith("experts.0.w1: readers of this format take experts in FP8_STATIC or NVFP4A16, not in FP8_DYNAMIC")
    tensors = exported(tmp_path / "NVFP4A16/master")
    assert tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight_scale_2"].shape == ()
