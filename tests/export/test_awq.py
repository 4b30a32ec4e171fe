"""The AWQ layout, read back number by number; and by GPTQModel through transformers where it is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import aerogel
from aerogel.engine.exporting import export, source_of
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.export.awq import AwqLayout
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.layers.scaled_input import ScaledInput
from tests.folders import model_folder
from tests.saved import SchemeOf, network, round_to_nearest, save, tokenizer
from tests.tiny import FAMILIES

Q_PROJ = "model.layers.0.self_attn.q_proj"
GPTQMODEL = Path(__file__).parents[2] / ".envs/gptqmodel/bin/python"
PLACES = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}
"""The place in a word, from the lowest bits up, of each of eight neighbouring outputs."""


def spread(words: Tensor) -> Tensor:
    """The unsigned numbers of four bits in rows of words, number by number."""
    rows = []
    for row in words.tolist():
        bits = [word & 0xFFFFFFFF for word in row]
        rows.append([(word >> (4 * PLACES[output])) & 15 for word in bits for output in range(8)])
    return torch.tensor(rows)


def literal_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """scales[g] * (code - zero[g])."""
    codes_IO, zeros_GO = spread(tensors[f"{name}.qweight"]), spread(tensors[f"{name}.qzeros"])
    scales_GO = tensors[f"{name}.scales"]
    size = len(codes_IO) // len(scales_GO)
    groups = torch.arange(len(codes_IO)) // size
    return (scales_GO[groups].float() * (codes_IO - zeros_GO[groups])).T


def exported(folder: Path, **options: int) -> dict[str, Tensor]:
    AwqLayout(**options).write(source_of(folder), folder.parent / "awq")
    return load_file(folder.parent / "awq/model.safetensors")


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.parent / "awq/config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_G64_ASYM", "W4A16_G16", "W4A16_CHANNEL", "W4A16_CHANNEL_ASYM"])
def test_every_weight_comes_back_bit_for_bit(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = network(scheme, dtype=dtype)
    save(given, tmp_path / "master")
    tensors = exported(tmp_path / "master")
    for name, linear in given.module.named_modules():
        if isinstance(linear, QuantLinear):
            assert literal_weight(tensors, name).equal(linear.dequantized(torch.float32)), name
    floats = {name: tensor for name, tensor in given.module.state_dict().items() if "proj" not in name}
    assert all(tensors[name].equal(tensor) for name, tensor in floats.items())
    assert len(tensors) == len(floats) + 3 * 14
    size = -1 if "CHANNEL" in scheme else int(scheme.split("_")[1][1:])
    assert settings(tmp_path / "master") == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": size, "zero_point": True,
        "modules_to_not_convert": ["model.embed_tokens", "lm_head"],
    }  # fmt: skip


def test_shapes_and_types_are_those_of_the_layout(tmp_path: Path) -> None:
    save(network("W4A16_G32", dtype=torch.bfloat16), tmp_path / "master")
    tensors = exported(tmp_path / "master")
    down = {part: tensors[f"model.layers.0.mlp.down_proj.{part}"] for part in ("qweight", "qzeros", "scales")}
    assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in down.items()} == {
        "qweight": ((128, 8), torch.int32), "qzeros": ((4, 8), torch.int32), "scales": ((4, 64), torch.float16),
    }  # fmt: skip
    assert down["qzeros"].eq(0x88888888 - 2**32).all()


def compressed(folder: Path, kind: str, ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """A model with experts as `compress` writes it."""
    model_folder(folder / "model", kind, dtype=torch.bfloat16)
    step = {"scheme": "W4A16_G16", "ignore": list(ignore)}
    aerogel.compress(folder / "model", {"name": "awq", "steps": [{"rtn": step}]}, output=folder / "master", measures=())
    return folder / "master"


def test_experts_stay_single(tmp_path: Path) -> None:
    tensors = exported(compressed(tmp_path, "mixtral"))
    before = load_file(tmp_path / "master/model.safetensors")
    packed = [name.removesuffix(".weight_packed") for name in before if name.endswith(".weight_packed")]
    assert any(".experts.1.w3" in name for name in packed)
    assert {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")} == set(packed)
    assert "model.layers.0.block_sparse_moe.gate" in settings(tmp_path / "master")["modules_to_not_convert"]


def test_experts_that_are_not_quantized_have_the_name_of_their_list(tmp_path: Path) -> None:
    exported(compressed(tmp_path, "qwen3_moe", ("lm_head", "*experts*")))
    assert settings(tmp_path / "master")["modules_to_not_convert"] == [
        "model.embed_tokens", "model.layers.0.mlp.experts", "model.layers.0.mlp.gate", "model.layers.1.mlp.experts",
        "model.layers.1.mlp.gate", "lm_head",
    ]  # fmt: skip


def test_names_are_those_of_checkpoints(tmp_path: Path) -> None:
    FAMILIES["llava"].build().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    given = open_model(tmp_path / "model", lazy=False, dtype=torch.bfloat16)
    round_to_nearest(given.module, lambda name: "W4A16_G16" if "language_model" in name else None)
    save(given, tmp_path / "master")
    tensors = exported(tmp_path / "master")
    skipped = settings(tmp_path / "master")["modules_to_not_convert"]
    assert "language_model.model.layers.0.self_attn.q_proj.qweight" in tensors
    assert {"vision_tower.encoder.layers.0.mlp.fc1", "multi_modal_projector.linear_1", "language_model.lm_head"} <= set(skipped)
    assert {f"{name}.weight" for name in skipped} <= tensors.keys()


def test_scales_of_the_cache_have_no_place(tmp_path: Path) -> None:
    recipe = {"steps": [{"rtn": {"scheme": "W4A16_G16"}}, {"kv_cache_fp8": {}}]}
    model_folder(tmp_path / "model", dtype=torch.bfloat16)
    aerogel.compress(tmp_path / "model", recipe, samples=FAMILIES["llama"].calls(1), output=tmp_path / "master", measures=())
    with pytest.warns(UserWarning, match="runs without kv_cache_fp8, which awq has no place for"):
        export(tmp_path / "master", "awq", tmp_path / "awq")
    assert not [name for name in load_file(tmp_path / "awq/model.safetensors") if name.endswith(("k_scale", "v_scale"))]


def test_experts_that_engines_do_not_read_are_refused(tmp_path: Path) -> None:
    (reason,) = AwqLayout().refuse(source_of(compressed(tmp_path / "fused", "gpt_oss")))
    assert reason.startswith("the experts of model.layers.0.mlp.experts are one tensor in checkpoints of this model")
    reasons = AwqLayout().refuse(source_of(compressed(tmp_path / "some", "mixtral", ("lm_head", "*experts.0.*"))))
    home = "model.layers.0.block_sparse_moe.experts"
    assert reasons[0] == f"some experts of {home} are quantized and others are not, and engines load them as one tensor"


def test_a_configuration_inside_that_of_the_language_model_moves_out(tmp_path: Path) -> None:
    save(network(lambda name: "W4A16_G16" if "language_model" in name else None, kind="llava", dtype=torch.float16), tmp_path / "master")
    path = tmp_path / "master/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    assert "model.language_model.layers.0.self_attn.q_proj.qweight" in exported(tmp_path / "master")
    assert "quantization_config" not in json.loads((tmp_path / "awq/config.json").read_text())["text_config"]
    assert settings(tmp_path / "master")["bits"] == 4


def test_shards_and_bytes_of_the_master_stay(tmp_path: Path) -> None:
    save(network(dtype=torch.float16), tmp_path / "master")
    before = {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()}
    AwqLayout(max_shard_size=20_000).write(source_of(tmp_path / "master"), tmp_path / "awq")
    assert len(list((tmp_path / "awq").glob("model-*.safetensors"))) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "master").iterdir()} == before


def _only(*parts: str) -> SchemeOf:
    return lambda name: "W4A16_G32" if name.endswith(parts) else None


REFUSED: dict[str, tuple[SchemeOf | str | None, str]] = {
    "other bits": ("W3A16_G32", "no weight-only integer scheme of 4 bits"),
    "8 bits": ("W8A16_G32", "no weight-only integer scheme of 4 bits"),
    "inputs": ("W4A8_G32", "no weight-only integer scheme of 4 bits"),
    "fp8": ("FP8_DYNAMIC", "no weight-only integer scheme of 4 bits"),
    "fp4": ("NVFP4A16", "no weight-only integer scheme of 4 bits"),
    "nothing": (None, "no linear layer in it is quantized"),
    "group": ("W4A16_G8", "groups of 8 have no kernels"),
    "sizes": (lambda name: f"W4A16_G{64 if 'mlp' in name else 32}" if "proj" in name else None, "several group sizes (32, 64)"),
    "part of a set": (_only("q_proj", "k_proj"), "q_proj is quantized and model.layers.0.self_attn.v_proj is not"),
    "head": (_only("proj", "lm_head"), "lm_head is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_say_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    scheme, words = REFUSED[case]
    save(network(scheme, dtype=torch.float16), tmp_path / "master")
    reasons = AwqLayout().refuse(source_of(tmp_path / "master"))
    assert reasons
    assert all(words in reason or "not quantized" in reason for reason in reasons), reasons
    with pytest.raises(AerogelError, match="cannot be written as AwqLayout: ") as raised:
        AwqLayout().write(source_of(tmp_path / "master"), tmp_path / "awq")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "awq").exists()


def test_activation_order_and_scaled_inputs_are_refused(tmp_path: Path) -> None:
    given = network(act_order=True, dtype=torch.float16)
    save(given, tmp_path / "a")
    assert all("groups follow activation order" in reason for reason in AwqLayout().refuse(source_of(tmp_path / "a")))
    given = network(dtype=torch.float16)
    inner = given.module.get_submodule(Q_PROJ)
    assert isinstance(inner, QuantLinear)
    given.module.set_submodule(Q_PROJ, ScaledInput(inner, torch.ones(inner.in_features)))
    save(given, tmp_path / "b")
    assert AwqLayout().refuse(source_of(tmp_path / "b")) == [f"{Q_PROJ} divides its input by a scale for each channel"]


def test_scales_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    save(network("W4A16_G32"), tmp_path / "master")
    reasons = AwqLayout().refuse(source_of(tmp_path / "master"))
    assert len(reasons) == 14
    assert all("(float32) has no exact value in float16" in reason for reason in reasons)


def test_scales_of_weights_that_are_zero_may_round(tmp_path: Path) -> None:
    given = network("W4A16_G32", dtype=torch.bfloat16)
    layer = given.module.get_submodule(Q_PROJ)
    assert isinstance(layer, QuantLinear)
    packed, scale = layer.get_buffer("weight_packed"), layer.get_buffer("weight_scale")
    packed[:2] = 0x88888888 - 2**32
    scale[0], scale[1] = 1e-30, 1e30
    save(given, tmp_path / "master")
    weight = literal_weight(exported(tmp_path / "master"), Q_PROJ)
    assert weight.equal(layer.dequantized(torch.float32))
    assert weight[:2].eq(0).all()
    packed[0, 0] += 1
    save(given, tmp_path / "other")
    (reason,) = AwqLayout().refuse(source_of(tmp_path / "other"))
    assert reason.startswith(f"{Q_PROJ}: the scale 9.98")


READER = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 23)[None]).logits.float(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not GPTQMODEL.exists(), reason="needs GPTQModel in .envs/gptqmodel")
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_G64_ASYM"])
def test_transformers_opens_it_with_gptqmodel_and_gives_our_logits(scheme: str, tmp_path: Path) -> None:
    given = network(scheme, dtype=torch.bfloat16, processor=tokenizer())
    save(given, tmp_path / "master")
    exported(tmp_path / "master")
    command = [str(GPTQMODEL), "-c", READER, str(tmp_path / "awq"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad(), cache_dequantized(given.module):
        ours = given.module(torch.arange(3, 23)[None]).logits.float()
    assert (theirs - ours).norm() < 0.02 * ours.norm()
