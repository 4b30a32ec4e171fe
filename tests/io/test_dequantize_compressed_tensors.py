"""compressed-tensors checkpoints of others: floats where a recipe quantizes their weights, quantized layers everywhere else."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from tests.saved import network, save, tokenizer
from tests.tiny import FAMILIES, output
from tests.twins import UP, change, configure, opened, random_codes, same, tensors_of, twins

RTN = {"steps": [{"rtn": {"scheme": "W8A8"}}]}
ROTATED = {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "weight_input"}, {"location": "input"}]}}}}
SCHEMES = ["W2A16_G32", "W3A16_G32_ASYM", "W4A16_G32_ASYM", "W4A16_CHANNEL", "W8A16_G64", "W8A8", "W8A8_STATIC", "W4A8_G32"]
SCHEMES += ["FP8_DYNAMIC", "FP8_STATIC", "NVFP4A16", "MXFP4A16"]


@pytest.mark.parametrize(
    ("scheme", "act_order"), [*((one, False) for one in (*SCHEMES, "mixed")), ("W4A16_G32_ASYM", True), ("W3A16_G32_ASYM", True)]
)
def test_every_scheme_is_dequantized_to_what_its_layers_compute_with(scheme: str, act_order: bool, tmp_path: Path) -> None:
    def of(name: str) -> str | None:
        return None if name == "lm_head" else ("W8A8" if "down_proj" in name else "W4A16_G32") if scheme == "mixed" else scheme

    given = network(of, dtype=torch.bfloat16, act_order=act_order)
    save(given, tmp_path / "in")
    found = opened(tmp_path / "in", dequantize=True)
    for name, linear in given.module.named_modules():
        if isinstance(linear, QuantLinear):
            assert torch.equal(found.get_parameter(f"{name}.weight"), linear.dequantized(torch.bfloat16)), name
            assert type(found.get_submodule(name)) is nn.Linear


def packed(
    name: str, weight: Tensor, generator: torch.Generator, strategy: str = "channel", kind: str = "int", zero: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Random values in one byte each, with one scale for each channel, group of 32, block of 16 x 32 or tensor; (value - zero) * scale."""
    rows, columns = weight.shape
    across, down = {"tensor": (columns, rows), "channel": (columns, 1), "group": (32, 1), "block": (32, 16)}[strategy]
    grid = (-(-rows // down), columns // across)
    values = (random_codes((rows, columns), 255, generator) - 127).to(torch.int8)
    if kind == "float":
        values = (torch.randn(rows, columns, generator=generator) * 20).to(torch.float8_e4m3fn)
    scale = (torch.rand(grid, generator=generator) * 1e-2 + 1e-3).to(torch.bfloat16)
    zeros = random_codes(grid, 255, generator) - 127 if zero else torch.zeros(grid)
    row, column = torch.arange(rows) // down, torch.arange(columns) // across
    exact = (values.float() - zeros[row][:, column]) * scale.float()[row][:, column]
    made = {"weight": values, "weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
    if zero:
        made["weight_zero_point"] = zeros.to(torch.int8)
    return {f"{name}.{part}": tensor for part, tensor in made.items()}, exact


def described(strategy: str = "channel", kind: str = "int", **more: Any) -> dict[str, Any]:
    """The config of llm-compressor for such layers."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, "observer": "minmax"}
    weights |= {"group": {"group_size": 32}, "block": {"block_structure": [16, 32]}}.get(strategy, {}) | more.pop("weights", {})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None} | more
    return {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}, "version": "0.14.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "kind", "zero"),
    [(strategy, kind, False) for strategy in ("channel", "group", "block", "tensor") for kind in ("int", "float")]
    + [("channel", "int", True), ("group", "int", True)],
)
def test_naive_layouts_that_are_not_opened_as_layers(strategy: str, kind: str, zero: bool, tmp_path: Path) -> None:
    config = described(strategy, kind, format="naive-quantized", weights={"symmetric": not zero})
    quantized, plain = twins(tmp_path, partial(packed, strategy=strategy, kind=kind, zero=zero), config)
    assert same(dict(opened(quantized, dequantize=True).state_dict()), dict(opened(plain, lazy=False).state_dict()))


def test_words_of_before_0_18(tmp_path: Path) -> None:
    """10 codes of 3 bits in a word, 2 bits left over."""
    codes = {}

    def pack(name: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        codes[name] = random_codes((rows, columns), 8, generator)
        words = torch.zeros(rows, -(-columns // 10), dtype=torch.int32)
        for column in range(columns):
            words[:, column // 10] |= (codes[name][:, column] << (3 * (column % 10))).int()
        scale = torch.rand(rows, 1, generator=generator).to(torch.bfloat16)
        made = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
        return {f"{name}.{part}": tensor for part, tensor in made.items()}, (codes[name] - 4) * scale.float()

    config = described(weights={"num_bits": 3}, format="pack-quantized") | {"format": "pack-quantized"}
    quantized, plain = twins(tmp_path, pack, config)
    assert same(dict(opened(quantized, dequantize=True).state_dict()), dict(opened(plain, lazy=False).state_dict()))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    return twins(tmp_path_factory.mktemp("compressed"), packed, described(input_activations=inputs))


@pytest.fixture
def quantized(both: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(both[0], tmp_path / "quantized"))


def test_a_recipe_that_quantizes_weights_starts_from_floats(both: tuple[Path, Path], tmp_path: Path) -> None:
    assert plan(both[0], RTN).remarks[0] == (
        "the source is quantized (compressed-tensors: int8 with a scale per channel); its weights are dequantized to bfloat16; "
        "this recipe starts from the dequantized weights"
    )
    assert plan(both[0], RTN).predicted_bytes == plan(both[1], RTN).predicted_bytes
    for folder in both:
        aerogel.compress(folder, RTN, output=tmp_path / folder.name, measures=())
    assert same(tensors_of(tmp_path / "quantized"), tensors_of(tmp_path / "plain"))


def test_everything_else_opens_quantized_layers(both: tuple[Path, Path]) -> None:
    network = open_model(both[0])
    assert network.dequantized is None
    assert isinstance(network.module.get_submodule(UP), QuantLinear)
    (call,) = FAMILIES["llama"].calls(1)
    floats = output(opened(both[1]), call)
    assert torch.equal(output(opened(both[0], dequantize=True), call), floats)
    assert not torch.equal(output(opened(both[0]), call), floats), "inputs are rounded to int8"
    with pytest.raises(AerogelError, match="rotate"):
        aerogel.compress(both[0], {"steps": [{"rotate": {}}]}, measures=())


def test_the_teacher_is_the_float_model_too(both: tuple[Path, Path]) -> None:
    from aerogel.engine.teacher import teacher_of

    teacher = teacher_of(open_model(both[0], dequantize=True))
    assert teacher.dequantized is not None
    assert type(teacher.module.get_submodule(UP)) is nn.Linear


def test_our_own_folders_stay_as_they_are(tmp_path: Path) -> None:
    save(network(None, dtype=torch.bfloat16, processor=tokenizer()), tmp_path / "in")
    first = {"steps": [{"rtn": {"scheme": "W4A16_G32", "targets": ["*mlp*"]}}]}
    aerogel.compress(tmp_path / "in", first, output=tmp_path / "first", measures=())
    aerogel.compress(tmp_path / "first", RTN, output=tmp_path / "second", measures=())
    module = open_model(tmp_path / "second").module
    assert [str(module.get_submodule(f"model.layers.0.{name}").scheme) for name in ("mlp.up_proj", "self_attn.q_proj")] == [  # type: ignore[union-attr]
        "W4A16_G32",
        "W8A8",
    ]
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "second"), "--recipe", "rtn-w8a8"])
    assert result.exit_code == 2
    assert "rtn reaches no linear layer of this model that is not quantized yet" in " ".join(result.output.split())


def test_scales_of_activations_are_left_out(quantized: Path, both: tuple[Path, Path]) -> None:
    change(quantized, {f"{UP}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)})
    found = open_model(quantized, dequantize=True)
    assert found.unbuilt is None
    assert str(found.dequantized).endswith("dequantized to bfloat16 and its scales of activations are not used")
    assert same(dict(opened(quantized, dequantize=True).state_dict()), dict(opened(both[1]).state_dict()))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{UP}.weight": None}, rf"config.json says compressed-tensors, and {UP}.weight has no {UP}.weight; get all files"),
        ({f"{UP}.weight": torch.ones(128, 64)}, rf"{UP}.weight is \[128, 64\] of torch.float32, expected a matrix of torch.int8"),
        ({f"{UP}.weight": torch.ones(128, 60, dtype=torch.int8)}, rf"{UP}.weight is \[128, 60\], the model expects \[128, 64\]"),
        ({f"{UP}.weight_scale": None}, rf"{UP}.weight is torch.int8, the model expects torch"),
        ({f"{UP}.weight_scale": torch.ones(64, 1)}, rf"{UP}.weight_scale is \[64, 1\] of torch.float32, expected \[128, 1\] or \[128\]"),
        ({f"{UP}.weight_scale": torch.ones(128, 1).int()}, rf"{UP}.weight_scale is \[128, 1\] of torch.int32, expected"),
        ({f"{UP}.weight_zero_point": torch.ones(4, 1)}, rf"{UP}.weight_zero_point is \[4, 1\] of torch.float32, expected \[128, 1\]"),
        ({f"{UP}.weight_g_idx": torch.ones(3).int()}, rf"{UP}.weight_g_idx is \[3\] of torch.int32, expected \[64\]"),
        ({f"{UP}.weight_packed": torch.ones(128, 16).int()}, rf"{UP}.weight_packed has no {UP}.weight_shape"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(changed: dict[str, Tensor | None], expected: str, quantized: Path) -> None:
    change(quantized, changed)
    with pytest.raises(AerogelError, match=expected) as error:
        plan(quantized, RTN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config has the format 'sparse-24-bitmask', expected 'dense'"),
        (ROTATED, r"transform_config rotates activations \(input\) while the model runs, which is not done here"),
        ({"transform_config": {"config_groups": 3}}, r"transform_config.config_groups: Input should be a valid dictionary"),
        ({"config_groups": {}}, rf"says of no group of compressed-tensors how {UP[:-7]}down_proj is quantized"),
        (described(weights={"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16}), r"expected a matrix of torch.uint8"),
        (described(weights={"num_bits": 9}), r"uses int9"),
        (described(strategy="token"), r"weights with a scale for each token, which is not read"),
        (described(strategy="group", weights={"group_size": 48}), r"weight_scale is \[\d+, 1\] of torch.bfloat16, expected \[\d+, 3\]"),
        (described(strategy="group", weights={"group_size": None}), r"has the strategy 'group' and no group_size"),
    ],
)
def test_configs_that_cannot_be_undone_are_refused(config: dict[str, Any], expected: str, quantized: Path) -> None:
    configure(quantized, described() | config)
    with pytest.raises(AerogelError, match=expected) as error:
        plan(quantized, RTN)
    assert "\n" not in str(error.value)


def test_rotations_of_activations_are_refused_whoever_reads(quantized: Path) -> None:
    """They were left out without a word: the answers had nothing to do with the model's."""
    configure(quantized, described() | ROTATED)
    with pytest.raises(AerogelError, match=r"transform_config rotates activations \(input\)"):
        open_model(quantized)
    configure(quantized, described() | {"transform_config": {"config_groups": {"R1": {"apply": [{"location": "weight_output"}]}}}})
    open_model(quantized, dequantize=True)


def test_groups_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    save(network("W4A16_G32", dtype=torch.bfloat16, act_order=True), tmp_path / "in")
    change(tmp_path / "in", {f"{UP}.weight_g_idx": torch.full((64,), 2, dtype=torch.int32)})
    with pytest.raises(AerogelError, match=rf"{UP}.weight_g_idx names the groups 2 to 2, and there are 2"):
        opened(tmp_path / "in", dequantize=True)
    change(tmp_path / "in", {f"{UP}.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)})
    opened(tmp_path / "in", dequantize=True)


def test_one_scheme_is_that_of_all_whatever_names_the_config_has(quantized: Path, both: tuple[Path, Path]) -> None:
    path = quantized / "config.json"
    settings = json.loads(path.read_text())
    group = settings["quantization_config"]["config_groups"]["group_0"]
    settings["quantization_config"]["config_groups"] = {
        name: group | {"targets": [f"re:.*{name}"], "input_activations": None} for name in ("q_proj", "mlp.gate_proj")
    }
    path.write_text(json.dumps(settings))
    assert same(dict(opened(quantized, dequantize=True).state_dict()), dict(opened(both[1]).state_dict()))
