"""GPTQ checkpoints open as the float models that a literal reader makes of them, and nothing of their format is left in the output."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.engine.exporting import source_of
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.export.gguf import Gguf
from aerogel.export.gptq import GptqLayout
from aerogel.io.dequantize.gptq import Layout, dequantize_gptq
from aerogel.layers.linear import QuantLinear
from tests.export.test_gptq import literal_weight
from tests.saved import network, save, tokenizer
from tests.tiny import FAMILIES, output
from tests.twins import UP, change, configure, opened, random_codes, same, tensors_of, twins, words

RTN = {"steps": [{"rtn": {"scheme": "W8A8"}}]}
PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}


def packed(
    name: str,
    weight: Tensor,
    generator: torch.Generator,
    bits: int = 4,
    group: int = 32,
    version: str = "gptq",
    order: str | None = "trivial",
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layer as AutoGPTQ stores them, and the weight that the literal reader makes of them."""
    outputs, inputs = weight.shape
    groups = inputs // group
    codes = random_codes((outputs, inputs), 1 << bits, generator)
    zeros = random_codes((groups, outputs), (1 << bits) - (version == "gptq"), generator)  # all ones are for zero points of 0
    g_idx = torch.arange(inputs) // group
    if order == "any":  # groups of any size, one of them empty
        g_idx = random_codes((inputs,), max(groups - 1, 1), generator)
    made = {
        f"{name}.qweight": torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32).T.contiguous(),
        f"{name}.qzeros": torch.tensor([words(row, bits) for row in zeros.tolist()], dtype=torch.int32),
        f"{name}.scales": (torch.rand(groups, outputs, generator=generator) * 1e-2 + 1e-3).half(),
        f"{name}.g_idx": g_idx.int(),
    }
    exact = literal_weight(made, name, bits, version)
    if order is None:
        del made[f"{name}.g_idx"]
    return made, exact


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in 4 bits; tests change copies of it."""
    return twins(tmp_path_factory.mktemp("gptq"), packed, PLAIN)[0]


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "quantized"))


@pytest.mark.parametrize("order", ["trivial", "any", None])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_minus_zero_points_times_scales(bits: int, version: str, order: str | None) -> None:
    made, exact = packed("a", torch.empty(32, 96), torch.Generator().manual_seed(bits), bits, version=version, order=order)
    layout = Layout("a", bits, 96, 32, 1 if version == "gptq" else 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize_gptq(*made.values(), layout=layout, dtype=dtype), exact.to(dtype))


def test_32_codes_of_3_bits_fill_three_words() -> None:
    """As AutoGPTQ writes them: 10 codes, 2 bits of one; 1 bit of it, 10 codes, 1 bit of one; 2 bits of it, 10 codes."""
    codes = [(place * 5 + 3) % 8 for place in range(32)]
    first = sum(codes[place] << (3 * place) for place in range(10)) | (codes[10] & 3) << 30
    second = codes[10] >> 2 | sum(codes[11 + place] << (3 * place + 1) for place in range(10)) | (codes[21] & 1) << 31
    third = codes[21] >> 1 | sum(codes[22 + place] << (3 * place + 2) for place in range(10))
    assert [word & 0xFFFFFFFF for word in words(codes, 3)] == [first, second, third]
    qweight = torch.tensor([words(codes, 3)] * 32, dtype=torch.int32).T
    zeros, scales = torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 32, dtype=torch.float16)
    found = dequantize_gptq(qweight, zeros, scales, layout=Layout("a", 3, 32, 32, 1), dtype=torch.float32)
    assert found[7].tolist() == [code - 1 for code in codes]


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    ("kind", "bits", "group", "order"), [("llama", 4, 32, "any"), ("llama", 3, 64, None), ("qwen3_moe", 8, 32, "trivial")]
)
def test_a_folder_opens_as_the_float_model(kind: str, bits: int, group: int, order: str | None, lazy: bool, tmp_path: Path) -> None:
    config = PLAIN | {"bits": bits, "group_size": group, "desc_act": order == "any"}
    quantized, plain = twins(tmp_path, partial(packed, bits=bits, group=group, order=order), config, kind)
    module, expected = opened(quantized, lazy), opened(plain, lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert all(type(part) is nn.Linear for name, part in module.named_modules() if name.endswith("_proj"))
    (call,) = FAMILIES[kind].calls(1)
    assert torch.equal(output(module, call), output(expected, call))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["W2A16_G32_ASYM", "W3A16_G32", "W4A16_G32", "W8A16_CHANNEL", "mixed"])
def test_our_own_export_opens_as_what_the_master_holds(scheme: str, act_order: bool, tmp_path: Path) -> None:
    def of(name: str) -> str | None:
        return None if name == "lm_head" else ("W8A16_G64" if "down_proj" in name else "W4A16_G32") if scheme == "mixed" else scheme

    given = network(of, dtype=torch.bfloat16, act_order=act_order and "CHANNEL" not in scheme)
    save(given, tmp_path / "master")
    GptqLayout().write(source_of(tmp_path / "master"), tmp_path / "gptq")
    found = opened(tmp_path / "gptq")
    for name, linear in given.module.named_modules():
        if isinstance(linear, QuantLinear):
            assert torch.equal(found.get_parameter(f"{name}.weight"), linear.dequantized(torch.bfloat16)), name


def test_the_output_is_that_of_the_float_model(tmp_path: Path) -> None:
    quantized, plain = twins(tmp_path, partial(packed, order="any"), PLAIN)
    (quantized / "quantize_config.json").write_text(json.dumps(PLAIN))
    for folder in (quantized, plain):
        aerogel.compress(folder, RTN, output=tmp_path / "out" / folder.name, measures=())
    ours, expected = tmp_path / "out" / "quantized", tmp_path / "out" / "plain"
    assert same(tensors_of(ours), tensors_of(expected))
    assert {path.name for path in ours.iterdir()} == {path.name for path in expected.iterdir()}, "settings of the source are left behind"
    assert json.loads((ours / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


def test_the_plan_names_the_format_and_counts_both_sides(tmp_path: Path) -> None:
    quantized, plain = twins(tmp_path, packed, PLAIN)
    planned = plan(quantized, RTN)
    assert planned.remarks[0] == (
        "the source is quantized (gptq: int4 with a scale per group of 32); its weights are dequantized to bfloat16; "
        "this recipe starts from the dequantized weights"
    )
    assert planned.source_bytes == sum(tensor.nbytes for tensor in tensors_of(quantized).values())
    assert planned.predicted_bytes == plan(plain, RTN).predicted_bytes
    configure(quantized, PLAIN | {"group_size": -1})
    change(quantized, dict[str, Tensor | None](packed(UP, torch.empty(128, 64), torch.Generator(), group=64)[0]))
    with pytest.raises(AerogelError, match="no weight of 4 bits in whole groups of -1"):
        plan(quantized, RTN)


def test_exporters_read_the_floats_too(tmp_path: Path) -> None:
    save(network("W4A16_G32", dtype=torch.bfloat16, processor=tokenizer()), tmp_path / "master")
    GptqLayout().write(source_of(tmp_path / "master"), tmp_path / "gptq")
    for name in ("master", "gptq"):
        Gguf().write(source_of(tmp_path / name), tmp_path / "out" / name)
    sizes = [(tmp_path / "out" / name / "model.gguf").stat().st_size for name in ("gptq", "master")]
    assert sizes[0] > sizes[1], "floats are written as such"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{UP}.qzeros": None}, rf"config.json says gptq, and {UP}.qweight has no {UP}.qzeros; get all files"),
        ({f"{UP}.scales": None}, rf"{UP}.qweight has no {UP}.scales"),
        ({f"{UP}.qweight": None}, rf"it lacks {UP}.weight"),
        ({f"{UP}.weight": torch.ones(128, 64)}, rf"has both {UP}.weight and {UP}.qweight"),
        ({f"{UP}.qweight": torch.ones(8, 128)}, rf"{UP}.qweight is \[8, 128\] of torch.float32, expected a matrix of torch.int32"),
        ({f"{UP}.qweight": torch.ones(0, 128).int()}, rf"{UP}.qweight is \[0, 128\] of torch.int32, expected a matrix"),
        ({f"{UP}.qweight": torch.ones(16, 128).int()}, rf"{UP}.qweight is \[16, 128\] and .* no weight of 4 bits in whole groups of 32"),
        ({f"{UP}.qweight": torch.ones(7, 128).int()}, r"no weight of 4 bits in whole groups of 32 \(bits and group_size in config.json\)"),
        ({f"{UP}.qzeros": torch.ones(2, 32).int()}, r"no weight of 4 bits"),
        ({f"{UP}.qzeros": torch.ones(2, 17).int()}, r"no weight of 4 bits"),
        ({f"{UP}.qzeros": torch.ones(2, 1).int()}, r"no weight of 4 bits"),
        ({f"{UP}.scales": torch.ones(3, 128)}, rf"{UP}.scales is \[3, 128\] of torch.float32, expected \[2, 128\] of torch.float16 or"),
        ({f"{UP}.scales": torch.ones(2, 128).int()}, rf"{UP}.scales is \[2, 128\] of torch.int32, expected \[2, 128\] of torch.float16 or"),
        ({f"{UP}.g_idx": torch.ones(63).int()}, rf"{UP}.g_idx is \[63\] of torch.int32, expected \[64\]"),
        ({f"{UP}.g_idx": torch.ones(64)}, rf"{UP}.g_idx is \[64\] of torch.float32, expected \[64\] of torch.int32 or torch.int64"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(changed: dict[str, Tensor | None], expected: str, quantized: Path) -> None:
    change(quantized, changed)
    with pytest.raises(AerogelError, match=expected) as error:
        open_model(quantized)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bits": 5}, r"bits is 5, expected one of 2, 3, 4, 8"),
        ({"bits": 4.0}, r"bits is 4.0, expected one of"),
        ({"bits": True}, r"bits is True, expected one of"),
        ({"bits": None}, r"bits is None, expected one of"),
        ({"bits": 8}, r"no weight of 8 bits in whole groups of 32"),
        ({"group_size": 48}, r"no weight of 4 bits in whole groups of 48"),
        ({"group_size": 64}, r"no weight of 4 bits in whole groups of 64"),
        ({"group_size": 0}, r"group_size is 0, expected -1 or a positive integer"),
        ({"group_size": 10**30}, r"group_size is 1000.*, expected -1 or a positive"),
        ({"group_size": "128"}, r"group_size is '128', expected"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin', expected one of gptq, gptq_v2"),
        ({"is_marlin_format": True}, r"is_marlin_format is True, expected one of False"),
        ({"pack_dtype": "int64"}, r"pack_dtype is 'int64', expected one of int32"),
        ({"dynamic": ["a"]}, r"dynamic is \['a'\], expected settings by pattern"),
        ({"dynamic": {"+:a": {"bits": 7}}}, r"bits is 7, expected one of 2, 3, 4, 8"),
    ],
)
def test_settings_that_the_layout_does_not_have_are_refused(config: dict[str, Any], expected: str, quantized: Path) -> None:
    configure(quantized, PLAIN | config)
    with pytest.raises(AerogelError, match=expected) as error:
        open_model(quantized)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group", [-1, 2])
def test_groups_that_do_not_exist_end_the_run_before_any_work(group: int, quantized: Path, tmp_path: Path) -> None:
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    g_idx[5] = group
    change(quantized, {f"{UP}.g_idx": g_idx})
    result = CliRunner().invoke(app, ["compress", str(quantized), "--recipe", "rtn-w8a8", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    low, high = min(group, 0), max(group, 1)
    assert f"{UP}.g_idx names the groups {low} to {high}, and {UP}.scales has 2" in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"quantized"}


def test_layers_in_activation_order_need_their_order(tmp_path: Path) -> None:
    quantized, _ = twins(tmp_path, partial(packed, order=None), PLAIN | {"desc_act": True})
    with pytest.raises(AerogelError, match=r"and \S+.qweight has no \S+.g_idx"):
        open_model(quantized)


def test_zero_points_that_readers_disagree_about_are_refused(quantized: Path) -> None:
    """A zero point of 0 minus one is -1: some readers make 16 of it, some 0, some count into the next code."""
    made = packed(UP, torch.empty(128, 64), torch.Generator())[0]
    zeros = made[f"{UP}.qzeros"]
    zeros[1, 3] |= 15 << 8
    change(quantized, {f"{UP}.qzeros": zeros})
    with pytest.raises(AerogelError, match=rf"{UP}.qzeros has a zero point of 0, which version 1 of the GPTQ layout cannot hold"):
        open_model(quantized, lazy=False)
    configure(quantized, PLAIN | {"checkpoint_format": "gptq_v2"})
    open_model(quantized, lazy=False)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_floats_of_which_the_config_says_that_they_are_quantized_are_refused(method: str, tmp_path: Path) -> None:
    save(network(None, dtype=torch.bfloat16), tmp_path / "in")
    configure(tmp_path / "in", {"quant_method": method, "bits": 4})
    with pytest.raises(AerogelError, match=rf"config.json says {method}, and no (tensor|weight) .*; get the config.json that belongs to"):
        open_model(tmp_path / "in")


def test_zero_biases_of_layers_that_have_none_are_left_out(quantized: Path, tmp_path: Path) -> None:
    """AutoGPTQ wrote them for every layer."""
    expected = dict(opened(quantized).state_dict())
    change(quantized, {f"{UP}.bias": torch.zeros(128).half()})
    assert same(dict(opened(quantized).state_dict()), expected)
    assert open_model(quantized).unbuilt is None
    aerogel.compress(quantized, RTN, output=tmp_path / "out", measures=())
    assert f"{UP}.bias" not in tensors_of(tmp_path / "out")
    change(quantized, {f"{UP}.bias": torch.ones(128).half()})
    with pytest.raises(AerogelError, match=rf"it has {UP}.bias, which is unknown"):
        open_model(quantized)


def test_a_head_that_is_quantized_apart_is_not_tied(quantized: Path) -> None:
    path = quantized / "config.json"
    settings = json.loads(path.read_text())
    head = packed("lm_head", torch.empty(128, 64), torch.Generator())
    change(quantized, head[0] | {"lm_head.weight": None})
    assert torch.equal(opened(quantized).get_parameter("lm_head.weight"), head[1].to(torch.bfloat16))
    path.write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(AerogelError, match=r"ties .*lm_head.weight is quantized apart; set tie_word_embeddings to false"):
        open_model(quantized)


def test_projections_that_are_one_layer_in_the_model(tmp_path: Path) -> None:
    quantized, plain = twins(tmp_path, packed, PLAIN, "phi3")
    assert any("qkv_proj.qweight" in name for name in tensors_of(quantized))
    assert same(dict(opened(quantized).state_dict()), dict(opened(plain).state_dict()))


def test_layers_whose_floats_lie_transposed(tmp_path: Path) -> None:
    """Conv1D of GPT-2: (inputs, outputs) in floats, a linear layer once it is quantized."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "quantized")
    for name, weight in tensors_of(tmp_path / "plain").items():
        if re.search(r"c_(attn|proj|fc)\.weight$", name):
            stored, exact = packed(name.removesuffix(".weight"), weight.T, torch.Generator().manual_seed(len(name)))
            change(tmp_path / "quantized", stored | {name: None})
            change(tmp_path / "plain", {name: exact.T.to(torch.bfloat16).contiguous()})
    configure(tmp_path / "quantized", PLAIN)
    assert same(dict(opened(tmp_path / "quantized").state_dict()), dict(opened(tmp_path / "plain").state_dict()))
    for name in ("quantized", "plain"):
        aerogel.compress(tmp_path / name, RTN, output=tmp_path / "out" / name, measures=())
    assert same(tensors_of(tmp_path / "out" / "quantized"), tensors_of(tmp_path / "out" / "plain"))
