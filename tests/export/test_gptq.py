"""The GPTQ layout, read back by a literal reader of its published description; and by GPTQModel itself where it is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aerogel.engine.exporting import source_of
from aerogel.errors import AerogelError
from aerogel.export.gptq import GptqLayout
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.layers.scaled_input import ScaledInput
from tests.saved import network, save, tokenizer

Q_PROJ = "model.layers.0.self_attn.q_proj"
GPTQMODEL = Path(__file__).parents[2] / ".envs/gptqmodel/bin/python"


def column_of_bits(words: Tensor, bits: int, count: int) -> list[int]:
    """The numbers in a column of int32 words, as one long integer from the lowest bit up."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]


def literal_weight(tensors: dict[str, Tensor], name: str, bits: int, version: str) -> Tensor:
    """scales[g] * (code - (zero + 1)) in version 1, scales[g] * (code - zero) in version 2, number by number."""
    qweight, qzeros, scales, g_idx = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(g_idx), scales.shape[1]
    codes = torch.tensor([column_of_bits(qweight[:, column], bits, inputs) for column in range(outputs)])
    zeros = torch.tensor([column_of_bits(row, bits, outputs) for row in qzeros])
    groups = g_idx.long()
    return (scales[groups].float() * (codes.T - (zeros[groups] + (1 if version == "gptq" else 0)))).T


def exported(folder: Path, **options: object) -> dict[str, Tensor]:
    GptqLayout(**options).write(source_of(folder), folder.parent / "gptq")  # type: ignore[arg-type]
    return load_file(folder.parent / "gptq/model.safetensors")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["W2A16_G32", "W3A16_G32", "W4A16_G32_ASYM", "W4A16_G64", "W8A16_G32", "W3A16_CHANNEL"])
def test_every_weight_comes_back_bit_for_bit(scheme: str, act_order: bool, tmp_path: Path) -> None:
    given = network(scheme, act_order=act_order and "CHANNEL" not in scheme)
    save(given, tmp_path / "master")
    tensors = exported(tmp_path / "master")
    version = json.loads((tmp_path / "gptq/quantize_config.json").read_text())["checkpoint_format"]
    assert version == ("gptq_v2" if "ASYM" in scheme else "gptq")
    for name, linear in given.module.named_modules():
        if isinstance(linear, QuantLinear):
            assert literal_weight(tensors, name, linear.scheme.bits, version).equal(linear.dequantized(torch.float32)), name
    floats = {name: tensor for name, tensor in given.module.state_dict().items() if "proj" not in name}
    assert all(tensors[name].equal(tensor) for name, tensor in floats.items())
    assert len(tensors) == len(floats) + 4 * 14


def test_symmetric_zero_points_are_the_middle_minus_one(tmp_path: Path) -> None:
    save(network("W4A16_G32"), tmp_path / "master")
    assert exported(tmp_path / "master")[f"{Q_PROJ}.qzeros"].eq(0x77777777).all()


def test_both_configurations_say_the_same(tmp_path: Path) -> None:
    def mixed(name: str) -> str | None:
        return None if name in ("lm_head", Q_PROJ) else "W8A16_G64_ASYM" if name.endswith("down_proj") else "W4A16_G32"

    save(network(mixed), tmp_path / "master")
    with pytest.warns(UserWarning, match="vLLM and SGLang do not open this folder"):
        exported(tmp_path / "master")
    settings = json.loads((tmp_path / "gptq/quantize_config.json").read_text())
    assert settings == json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert settings | {"meta": None, "dynamic": None} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq_v2", "pack_dtype": "int32", "meta": None, "dynamic": None,
    }  # fmt: skip
    down = {"bits": 8, "group_size": 64, "sym": False, "desc_act": False}
    assert settings["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": down,
        r"+:^model\.layers\.1\.mlp\.down_proj$": down,
    }


def test_a_channel_has_no_group_size_and_reordered_columns_are_said(tmp_path: Path) -> None:
    save(network("W4A16_CHANNEL"), tmp_path / "a/master")
    exported(tmp_path / "a/master")
    save(network("W4A16_G32", act_order=True), tmp_path / "b/master")
    exported(tmp_path / "b/master")
    said = [json.loads((tmp_path / part / "gptq/quantize_config.json").read_text()) for part in "ab"]
    assert [(settings["group_size"], settings["desc_act"]) for settings in said] == [(-1, False), (32, True)]


def test_shards_and_bytes_of_the_master_stay(tmp_path: Path) -> None:
    save(network(), tmp_path / "master")
    before = {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()}
    GptqLayout(max_shard_size=20_000).write(source_of(tmp_path / "master"), tmp_path / "gptq")
    assert len(list((tmp_path / "gptq").glob("model-*.safetensors"))) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()} == before


@pytest.mark.parametrize(
    ("scheme", "word"),
    [
        ("W8A8", "no weight-only integer scheme"),
        ("FP8_DYNAMIC", "no weight-only integer scheme"),
        ("W5A16_G32", "no weight-only integer scheme"),
        (None, "no linear layer in it is quantized"),
    ],
)
def test_what_the_layout_cannot_say_is_refused_before_any_work(scheme: str | None, word: str, tmp_path: Path) -> None:
    save(network(scheme), tmp_path / "master")
    assert all(word in reason for reason in GptqLayout().refuse(source_of(tmp_path / "master")))
    with pytest.raises(AerogelError, match=f"cannot be written as GptqLayout: .*{word}"):
        GptqLayout().write(source_of(tmp_path / "master"), tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("odd", [None, "W8A16_G32"])
def test_sets_that_are_quantized_in_part_are_written_with_a_warning(odd: str | None, tmp_path: Path) -> None:
    """GPTQModel and transformers read layer by layer; vLLM and SGLang load query, key and value as one tensor."""
    save(network(lambda name: None if name == "lm_head" else odd if name.endswith("k_proj") else "W4A16_G32"), tmp_path / "master")
    told = "q_proj has W4A16_G32 and .*k_proj W8A16_G32" if odd else "q_proj is quantized and .*k_proj is not"
    with pytest.warns(UserWarning, match=f"vLLM and SGLang do not open this folder, GPTQModel and transformers do: .*{told}"):
        exported(tmp_path / "master")


def test_a_set_that_is_left_out_whole_is_no_reason_to_warn(tmp_path: Path) -> None:
    save(
        network(lambda name: None if name == "lm_head" or name.endswith(("q_proj", "k_proj", "v_proj")) else "W4A16_G32"),
        tmp_path / "master",
    )
    exported(tmp_path / "master")


def test_scaled_inputs_are_refused(tmp_path: Path) -> None:
    given = network()
    inner = given.module.get_submodule(Q_PROJ)
    assert isinstance(inner, QuantLinear)
    given.module.set_submodule(Q_PROJ, ScaledInput(inner, torch.ones(inner.in_features)))
    save(given, tmp_path / "master")
    assert GptqLayout().refuse(source_of(tmp_path / "master")) == [f"{Q_PROJ} divides its input by a scale for each channel"]


READER = """
import sys, torch
from gptqmodel import GPTQModel, BACKEND
model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH if hasattr(BACKEND, "GPTQ_TORCH") else BACKEND.TORCH, device="cpu")
torch.save(model.model(torch.arange(3, 23)[None]).logits.float(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not GPTQMODEL.exists(), reason="needs GPTQModel in .envs/gptqmodel")
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W3A16_G32", "W4A16_G32_ASYM", "W8A16_G64"])
def test_gptqmodel_opens_it_and_gives_our_logits(scheme: str, tmp_path: Path) -> None:
    given = network(scheme, dtype=torch.bfloat16, processor=tokenizer())
    save(given, tmp_path / "master")
    GptqLayout().write(source_of(tmp_path / "master"), tmp_path / "gptq")
    command = [str(GPTQMODEL), "-c", READER, str(tmp_path / "gptq"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad(), cache_dequantized(given.module):
        ours = given.module(torch.arange(3, 23)[None]).logits.float()
    assert (theirs - ours).norm() < 0.02 * ours.norm()
