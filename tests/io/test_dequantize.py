"""fp8 and mxfp4 checkpoints open as the float models that their formulas give, and nothing of their format is left in the output."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.engine.exporting import source_of
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.engine.resume import fingerprint_of
from aerogel.errors import AerogelError
from aerogel.export.compressed_tensors import CompressedTensors
from aerogel.export.gguf import Gguf
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.dequantize import block_of, dequantize_blocks, dequantize_mxfp4, dequantizer_of
from aerogel.io.record import files
from aerogel.report import page
from tests.folders import model_folder
from tests.saved import network, save, tokenizer
from tests.tiny import FAMILIES, output

RTN = {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
ROTATE = {"steps": [{"rotate": {}}]}
UP = "model.layers.0.mlp.up_proj.weight"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def literal(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The formula number by number: weight[o, i] * scale[o // rows, i // columns], rounded to bfloat16."""
    found = torch.zeros(weight.shape, dtype=torch.bfloat16)
    values, scales = weight.float().tolist(), scale.float().tolist()
    for o, row in enumerate(values):
        for i, value in enumerate(row):
            found[o, i] = torch.tensor(value) * torch.tensor(scales[o // block[0]][i // block[1]])
    return found


def fp8(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float8 values, and scales of their blocks."""
    generator = torch.Generator().manual_seed(seed)
    *leading, rows, columns = shape
    scale = torch.rand(*leading, math.ceil(rows / block[0]), math.ceil(columns / block[1]), generator=generator) * 1e-2 + 1e-3
    return (torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn), scale


def expanded(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    return scale[..., rows, :][..., columns]


def as_fp8(folder: Path, block: tuple[int, int] | str = (48, 48), config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Store the projections of a folder in float8 with their scales, as others do; returns the float tensors that they stand for."""
    path = folder / "model.safetensors"
    tensors, floats = load_file(path), {}
    stored = dict(tensors)
    for name, weight in tensors.items():
        floats[name] = weight
        if weight.ndim < 2 or not re.search(r"(_proj|\.w[123])(\.weight)?$", name):
            continue
        sides = tuple(weight.shape[-2:])
        size = {"tensor": sides, "channel": (1, sides[1])}[block] if isinstance(block, str) else block
        values, scale = fp8(tuple(weight.shape), size, len(floats))
        floats[name] = (values.float() * expanded(scale, weight.shape, size)).to(torch.bfloat16)
        stored[name], stored[f"{name}_scale_inv"] = values, scale.reshape(()) if block == "tensor" and weight.ndim == 2 else scale
    save_file(stored, path, {"format": "pt"})
    told = {"quant_method": "fp8", "activation_scheme": "dynamic"} | ({} if isinstance(block, str) else {"weight_block_size": list(block)})
    configure(folder, told if config is None else config)
    return floats


def configure(folder: Path, quantization: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of a folder, or remove them; names have __ for dots."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        found.pop(name.replace("__", "."), None)
        if tensor is not None:
            found[name.replace("__", ".")] = tensor
    save_file(found, path, {"format": "pt"})


def both(tmp_path: Path, kind: str = "llama", block: tuple[int, int] | str = (48, 48)) -> tuple[Path, Path]:
    """A folder in fp8, and one of the same weights in bfloat16."""
    quantized, plain = (model_folder(tmp_path / name, kind, torch.bfloat16) for name in ("fp8", "plain"))
    save_file(as_fp8(quantized, block), plain / "model.safetensors", {"format": "pt"})
    return quantized, plain


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def resident(folder: Path, lazy: bool) -> nn.Module:
    network = open_model(folder, lazy=lazy, dtype=torch.bfloat16)
    if lazy:
        assert network.checkpoint is not None
        assert all(parameter.is_meta for block in network.blocks().values() for parameter in block.parameters())
        network.checkpoint.materialise(network.module)
    return network.module


@pytest.mark.parametrize("block", [(2, 3), (4, 4), (16, 16), (1, 7), (5, 7), (128, 128)])
def test_blocks_are_multiplied_by_their_scales(block: tuple[int, int]) -> None:
    values, scale = fp8((5, 7), block)
    assert torch.equal(dequantize_blocks(values, scale, block, torch.bfloat16), literal(values, scale, block))


def test_many_rows_and_experts_are_done_in_parts() -> None:
    values, scale = fp8((2, 1030, 5), (100, 4))
    found = dequantize_blocks(values, scale, (100, 4), torch.bfloat16)
    assert found.shape == values.shape
    for number in range(2):
        assert torch.equal(found[number], literal(values[number], scale[number], (100, 4)))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e8m0", "bytes"])
def test_transformers_dequantizes_to_the_same(kind: str) -> None:
    values, scale = fp8((32, 48), (16, 16))
    exponents = torch.randint(110, 130, scale.shape, dtype=torch.uint8)
    scale = {"float32": scale, "bfloat16": scale.bfloat16(), "e8m0": exponents.view(torch.float8_e8m0fnu), "bytes": exponents}[kind]
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale, torch.bfloat16)
    assert torch.equal(dequantize_blocks(values, scale, (16, 16), torch.bfloat16), theirs)


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        ((200, 300), (2, 3), (128, 128)),
        ((200, 300), (), (200, 300)),
        ((200, 300), (1,), (200, 300)),
        ((200, 300), (200, 1), (1, 300)),
        ((200, 300), (200,), (1, 300)),
        ((4, 200, 300), (4, 2, 3), (128, 128)),
        ((4, 200, 300), (4, 200, 1), (1, 300)),
        ((4, 200, 300), (4,), (200, 300)),
        ((4, 200, 300), (4, 1, 1), (200, 300)),
        ((200, 300), (3, 2), None),
        ((200, 300), (1, 2), None),
        ((200, 300), (300,), None),
        ((4, 200, 300), (2, 3), None),
        ((200,), (), None),
    ],
)
def test_what_shares_a_scale_is_read_from_the_shapes(
    weight: tuple[int, ...], scale: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    assert block_of(weight, scale, (128, 128)) == expected


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("llama", (48, 48)),
        ("llama", "tensor"),
        ("llama", "channel"),
        ("qwen3_moe", (48, 48)),
        ("mixtral", (32, 16)),
        ("gpt_oss", (48, 48)),
        ("gpt_oss", "tensor"),
    ],
)
@pytest.mark.parametrize("lazy", [True, False])
def test_a_folder_opens_as_the_float_model(kind: str, block: tuple[int, int] | str, lazy: bool, tmp_path: Path) -> None:
    quantized, plain = both(tmp_path, kind, block)
    module = resident(quantized, lazy)
    expected = resident(plain, lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert all(type(part) is nn.Linear for name, part in module.named_modules() if name.endswith("_proj"))
    for call in FAMILIES[kind].calls(1):
        assert torch.equal(output(module, call), output(expected, call))


def test_it_is_what_transformers_opens(tmp_path: Path) -> None:
    quantized, plain = both(tmp_path, block=(16, 32))
    settings = transformers.FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    options = {"dtype": torch.bfloat16, "quantization_config": settings}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(quantized, **options).eval()
    floats = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
    ours = resident(quantized, lazy=True)
    assert torch.equal(ours.get_parameter(UP), theirs.get_parameter(UP))
    for call in FAMILIES["llama"].calls(1):
        assert torch.equal(output(ours, call), output(theirs, call))
        assert torch.equal(output(ours, call), output(floats, call))


def test_the_dtype_is_that_of_the_config(tmp_path: Path) -> None:
    quantized, _ = both(tmp_path)
    values, scale = (load_file(quantized / "model.safetensors")[name] for name in (UP, f"{UP}_scale_inv"))
    exact = values.float() * expanded(scale, values.shape, (48, 48))
    for named, dtype in {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.bfloat16}.items():
        checkpoint = Checkpoint.open(quantized, dequantize=dequantizer_of(settings_of(quantized) | {"dtype": named}, quantized))
        assert checkpoint.dtype(UP) == dtype
        assert torch.equal(checkpoint.tensor(UP), exact.to(dtype))


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_layers_that_were_not_converted_and_scales_of_inputs(tmp_path: Path) -> None:
    quantized, plain = both(tmp_path)
    up = load_file(plain / "model.safetensors")[UP]
    scales = {UP.replace(".weight", ".input_scale").replace("up", "down"): torch.ones(())}
    scales["model.layers.0.self_attn.k_scale"] = torch.ones(())
    change(quantized, **{UP: up, f"{UP}_scale_inv": None}, **scales)
    configure(quantized, {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.up_proj"], "weight_block_size": [48, 48]})
    network = open_model(quantized)
    assert network.unbuilt is None
    assert network.dequantized is not None
    assert network.dequantized.endswith("its scales of activations are not used")
    assert same(dict(resident(quantized, True).state_dict()), dict(resident(plain, False).state_dict()))


@pytest.mark.parametrize("suffix", ["weight_scale", "scale", "qscale_weight"])
def test_scales_go_by_other_names_too(suffix: str, tmp_path: Path) -> None:
    quantized, plain = both(tmp_path)
    found = {re.sub("weight_scale_inv$", suffix, name): tensor for name, tensor in tensors_of(quantized).items()}
    save_file(found, quantized / "model.safetensors", {"format": "pt"})
    assert same(dict(resident(quantized, True).state_dict()), dict(resident(plain, False).state_dict()))


def test_a_config_inside_that_of_the_language_model(tmp_path: Path) -> None:
    quantized, plain = tmp_path / "fp8", tmp_path / "plain"
    for folder in (quantized, plain):
        FAMILIES["llava"].build().to(torch.bfloat16).save_pretrained(folder)
    save_file(as_fp8(quantized), plain / "model.safetensors", {"format": "pt"})
    settings = settings_of(quantized)
    settings["text_config"]["quantization_config"] = settings.pop("quantization_config")
    (quantized / "config.json").write_text(json.dumps(settings))
    assert same(dict(resident(quantized, True).state_dict()), dict(resident(plain, False).state_dict()))
    aerogel.compress(quantized, RTN, output=tmp_path / "out", measures=())
    settings = settings_of(tmp_path / "out")
    assert "quantization_config" not in settings["text_config"]
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    assert aerogel.load(tmp_path / "out").dequantized is None


def test_a_weight_and_its_scale_may_be_in_different_files(tmp_path: Path) -> None:
    quantized, plain = both(tmp_path, "qwen3_moe")
    found = tensors_of(quantized)
    (quantized / "model.safetensors").unlink()
    scales = {name for name in found if name.endswith("_scale_inv")}
    save_file({name: found[name] for name in found.keys() - scales}, quantized / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({name: found[name] for name in scales}, quantized / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = {name: f"model-0000{1 + (name in scales)}-of-00002.safetensors" for name in found}
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same(dict(resident(quantized, True).state_dict()), dict(resident(plain, False).state_dict()))
    network = open_model(quantized)
    assert network.checkpoint is not None
    before = fingerprint_of(network.checkpoint)
    save_file({name: found[name] * 2 for name in scales}, quantized / "model-00002-of-00002.safetensors", {"format": "pt"})
    assert fingerprint_of(network.checkpoint) != before, "an unfinished run is not resumed with other scales"


def test_exporters_read_the_floats_too(tmp_path: Path) -> None:
    save(network(None, dtype=torch.bfloat16, processor=tokenizer()), tmp_path / "fp8")
    shutil.copytree(tmp_path / "fp8", tmp_path / "plain")
    save_file(as_fp8(tmp_path / "fp8"), tmp_path / "plain/model.safetensors", {"format": "pt"})
    for name in ("fp8", "plain"):
        Gguf().write(source_of(tmp_path / name), tmp_path / "out" / name)
    readers = (gguf.GGUFReader(tmp_path / "out" / name / "model.gguf") for name in ("fp8", "plain"))
    ours, expected = ({one.name: one.data for one in reader.tensors} for reader in readers)
    assert ours.keys() == expected.keys()
    assert all((ours[name] == expected[name]).all() for name in ours)
    assert CompressedTensors().refuse(source_of(tmp_path / "fp8")) == ["it is quantized in another format, fp8; compress it first"]
    assert not CompressedTensors().refuse(source_of(tmp_path / "plain"))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_output_is_that_of_the_float_model(kind: str, tmp_path: Path) -> None:
    quantized, plain = both(tmp_path, kind)
    for folder in (quantized, plain):
        aerogel.compress(folder, RTN, output=tmp_path / "out" / folder.name, measures=())
    ours, expected = tmp_path / "out" / "fp8", tmp_path / "out" / "plain"
    assert same(tensors_of(ours), tensors_of(expected))
    assert not [name for name in tensors_of(ours) if name.endswith("_scale_inv")]
    assert settings_of(ours) == settings_of(expected)
    assert settings_of(ours)["quantization_config"]["quant_method"] == "compressed-tensors"
    for call in FAMILIES[kind].calls(1):
        assert torch.equal(output(resident(ours, True), call), output(resident(expected, False), call))


def test_a_recipe_that_quantizes_nothing_saves_floats(tmp_path: Path) -> None:
    quantized, _ = both(tmp_path)
    aerogel.compress(quantized, ROTATE, output=tmp_path / "out", measures=())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert "quantization_config" not in settings_of(tmp_path / "out")
    (call,) = FAMILIES["llama"].calls(1)
    torch.testing.assert_close(output(resident(tmp_path / "out", True), call), output(resident(quantized, True), call), rtol=0, atol=0.25)


def test_the_plan_says_where_weights_come_from_and_counts_both_sides(tmp_path: Path) -> None:
    quantized, plain = both(tmp_path)
    planned = plan(quantized, RTN)
    assert planned.remarks[0] == (
        "the source is quantized (fp8: float8_e4m3fn with a scale per block of 48 x 48); its weights are dequantized to bfloat16; "
        "this recipe starts from the dequantized weights"
    )
    assert planned.source_bytes == sum(tensor.nbytes for tensor in tensors_of(quantized).values())
    assert planned.predicted_bytes == plan(plain, RTN).predicted_bytes
    assert "dequantized" not in " ".join(plan(plain, RTN).remarks)
    assert plan(open_model(quantized, lazy=False), RTN).remarks == planned.remarks
    shown = CliRunner().invoke(app, ["plan", str(quantized), "--recipe", "rtn-w4a16", "--set", "rtn.scheme=W4A16_G32"])
    assert shown.exit_code == 0, shown.output
    assert "dequantized to bfloat16" in " ".join(shown.output.split())


def test_tensors_without_a_module_are_dequantized_too(tmp_path: Path) -> None:
    quantized, plain = both(tmp_path, "deepseek_v3")
    values, scale = fp8((64, 128), (48, 48))
    name = "model.layers.61.eh_proj.weight"
    change(quantized, **{name: values, f"{name}_scale_inv": scale})
    change(plain, **{name: literal(values, scale, (48, 48))})
    for folder in (quantized, plain):
        aerogel.compress(folder, RTN, output=tmp_path / "out" / folder.name, measures=())
    assert name in tensors_of(tmp_path / "out" / "fp8")
    assert same(tensors_of(tmp_path / "out" / "fp8"), tensors_of(tmp_path / "out" / "plain"))
    assert plan(quantized, RTN).predicted_bytes == plan(plain, RTN).predicted_bytes


def as_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Store fused experts in mxfp4; returns the float tensors that they stand for."""
    path = folder / "model.safetensors"
    floats = load_file(path)
    stored = {}
    for number, (name, weight) in enumerate(floats.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        generator = torch.Generator().manual_seed(number)
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, path, {"format": "pt"})
    configure(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return floats


def test_mxfp4_is_two_values_a_byte_and_an_exponent_a_group() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
    scales = torch.randint(120, 130, (2, 8), dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    assert found.shape == (256, 2)
    for o in range(2):
        for i in range(256):
            byte = int(blocks[o, i // 32, i % 32 // 2])
            code = byte >> 4 if i % 2 else byte & 15
            assert float(found[i, o]) == (-1) ** (code >> 3) * FP4[code & 7] * 2.0 ** (int(scales[o, i // 32]) - 127)


@pytest.mark.parametrize("lazy", [True, False])
def test_mxfp4_folders_open_as_the_float_model(lazy: bool, tmp_path: Path) -> None:
    quantized, plain = (model_folder(tmp_path / name, "gpt_oss", torch.bfloat16) for name in ("mxfp4", "plain"))
    save_file(as_mxfp4(quantized), plain / "model.safetensors", {"format": "pt"})
    module, expected = resident(quantized, lazy), resident(plain, False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    (call,) = FAMILIES["gpt_oss"].calls(1)
    assert torch.equal(output(module, call), output(expected, call))


def test_mxfp4_folders_are_compressed(tmp_path: Path) -> None:
    quantized, plain = (model_folder(tmp_path / name, "gpt_oss", torch.bfloat16) for name in ("mxfp4", "plain"))
    save_file(as_mxfp4(quantized), plain / "model.safetensors", {"format": "pt"})
    assert plan(quantized, RTN).remarks[0].startswith("the source is quantized (mxfp4: fp4_e2m1 with a scale per group of 32)")
    for folder in (quantized, plain):
        aerogel.compress(folder, RTN, output=tmp_path / "out" / folder.name, measures=())
    assert same(tensors_of(tmp_path / "out" / "mxfp4"), tensors_of(tmp_path / "out" / "plain"))
    name = "model.layers.0.mlp.experts.down_proj_scales"
    change(quantized, **{name: tensors_of(quantized)[name][:, :1].contiguous()})
    with pytest.raises(AerogelError, match=r"down_proj_scales is \[4, 1, \d\] of torch.uint8, expected \[4, 64, \d\] of torch.uint8 for"):
        open_model(quantized)
    change(quantized, **{name: None})
    with pytest.raises(AerogelError, match=r"says mxfp4, and \S*down_proj_blocks has no scales \(expected \S*down_proj_scales\)"):
        open_model(quantized)


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({f"{UP}_scale_inv": None}, rf"config.json says fp8, and {UP} is torch.float8_e4m3fn without a scale \(expected {UP}_scale_inv\)"),
        (
            {f"{UP}_scale_inv": torch.ones(2, 2)},
            rf"{UP}_scale_inv is \[2, 2\], which does not fit {UP} \[128, 64\] in blocks of 48 x 48",
        ),
        ({f"{UP}_scale_inv": torch.ones(3)}, rf"{UP}_scale_inv is \[3\], which does not fit"),
        ({UP: torch.ones(128, 64).bfloat16()}, rf"it has {UP}_scale_inv, which is unknown"),
    ],
)
def test_weights_and_scales_that_do_not_go_together_are_refused(replaced: dict[str, Tensor | None], expected: str, tmp_path: Path) -> None:
    quantized, _ = both(tmp_path)
    change(quantized, **replaced)
    with pytest.raises(AerogelError, match=expected):
        open_model(quantized)


@pytest.mark.parametrize("size", ["128", [128], [0, 128], [128.0, 128]])
def test_a_wrong_block_size_is_refused(size: Any, tmp_path: Path) -> None:
    quantized, _ = both(tmp_path)
    configure(quantized, {"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(AerogelError, match=r"config.json: weight_block_size is .*, expected two positive integers"):
        open_model(quantized)


@pytest.mark.parametrize("with_scales", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_that_no_config_speaks_of_are_refused(with_scales: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """They were read as numbers: the answers had nothing to do with the model's."""
    folder = model_folder(tmp_path / "in", dtype=torch.bfloat16)
    up = load_file(folder / "model.safetensors")[UP].float()
    change(folder, **{UP: (up / up.abs().max() * 400).to(dtype)}, **({f"{UP}_scale_inv": torch.ones(2, 2)} if with_scales else {}))
    expected = (
        rf"model.safetensors: {UP} is {dtype}, the model expects torch.(bfloat16|float32); config.json says nothing of its scale; get"
    )
    for lazy in (True, False):
        with pytest.raises(AerogelError, match=expected):
            open_model(folder, lazy=lazy)
    for command in (["plan", folder, "--recipe", "rtn-w4a16"], ["compress", folder, "--recipe", "rtn-w4a16", "--output", tmp_path / "out"]):
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 2
        assert f"{UP} is {dtype}" in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_float8_weights_with_names_of_another_time_are_refused(tmp_path: Path) -> None:
    """transformers, which reads such folders whole, would take them for numbers too."""
    folder = model_folder(tmp_path / "in", dtype=torch.bfloat16)
    found = {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()}
    name = UP.removeprefix("model.")
    save_file(found | {name: found[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AerogelError, match=r"its quantized checkpoint is not one of a LlamaForCausalLM"):
        open_model(folder)


def test_wider_floats_are_not_rounded_to_float8_on_the_way(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "in", dtype=torch.bfloat16)
    aerogel.compress(folder, {"steps": [{"rtn": {"scheme": "FP8_DYNAMIC"}}]}, output=tmp_path / "out", measures=())
    assert tensors_of(tmp_path / "out")[UP].dtype == torch.float8_e4m3fn
    assert open_model(tmp_path / "out").dequantized is None
    change(tmp_path / "out", **{UP: tensors_of(folder)[UP]})
    with pytest.raises(AerogelError, match=rf"{UP} is torch.bfloat16, the model expects torch.float8_e4m3fn; config.json does not fit"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "eetq", "vptq", "torchao", "spqr", "higgs", "bitnet", "exl2", None])
def test_other_methods_are_refused_before_work_begins(method: str | None, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "in", dtype=torch.bfloat16)
    change(folder, **{UP: None, UP.replace("weight", "qweight"): torch.zeros(8, 128, dtype=torch.int32)})
    configure(folder, {"quant_method": method, "bits": 4})
    result = CliRunner().invoke(app, ["compress", str(folder), "--recipe", "rtn-w4a16", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert f"quant_method={method!r}, which is not opened; give the original model in 16 bits" in text
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "in", dtype=torch.bfloat16)
    configure(folder, ["fp8"])
    with pytest.raises(AerogelError, match=r"quantization_config in config.json is \['fp8'\], expected a JSON object"):
        open_model(folder)


def test_a_config_that_says_fp8_over_plain_floats_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(AerogelError, match=r"config\.json says fp8, and none of the weights is float8; get the config\.json that belongs"):
        open_model(folder)


def test_the_record_and_the_report_say_what_was_dequantized(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    scale = torch.tensor([0.01])
    tensors |= {UP: (tensors[UP] / scale).to(torch.float8_e4m3fn), f"{UP}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    aerogel.compress(folder, RTN, output=tmp_path / "out", measures=())
    told = "the source is quantized (fp8: float8_e4m3fn with a scale per tensor); its weights are dequantized to float32"
    assert files.read(tmp_path / "out").provenance.dequantized == told
    assert f"<dt>Source</dt><dd>{told}</dd>" in page.page(files.read(tmp_path / "out"))
    aerogel.compress(model_folder(tmp_path / "floats", num_hidden_layers=1), RTN, output=tmp_path / "plain", measures=())
    assert "dequantized" not in (tmp_path / "plain" / "aerogel.json").read_text()
