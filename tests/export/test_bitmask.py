"""Bit masks: smaller folders that open as what they were made from, bit for bit, and that nobody takes for something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from aerogel.engine.exporting import export, source_of
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.export.bitmask import Bitmask
from aerogel.io import bitmask
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network
from aerogel.numerics.packing import raw_bytes
from aerogel.numerics.sparsity import zero_share
from tests.folders import model_folder
from tests.image_pipelines import classes
from tests.saved import round_to_nearest, save
from tests.tiny import FAMILIES, family_of
from tests.twins import UP, change


def half_zero(weight: Tensor) -> None:
    """Set the smaller half of each row to zero, in place."""
    order = weight.detach().abs().argsort(dim=-1)[..., : weight.shape[-1] // 2]
    weight.data.scatter_(-1, order, 0)


def pruned(kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Network:
    """A tiny network with half of its weights zero in all blocks, fused experts among them."""
    module = FAMILIES[kind].build().to(dtype)
    for name, parameter in module.named_parameters():
        if ".layers." in name and parameter.ndim > 1:
            half_zero(parameter)
    return Network(module, family_of(kind))


def pruned_and_quantized(scheme: str) -> Network:
    """The same with the other half of the weights as codes of a scheme."""
    given = pruned(dtype=torch.float32)
    return Network(round_to_nearest(given.module, scheme), given.family)


def of_blocks(folder: Path) -> list[str]:
    """The names of the matrices in blocks."""
    return [name for name, tensor in tensors_in(folder).items() if ".layers." in name and tensor.ndim > 1]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as they lie there."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_module(one: nn.Module, other: nn.Module) -> None:
    """Compare two modules bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(raw_bytes(tensor), raw_bytes(theirs[name])), name


def opened(folder: Path, **options: Any) -> nn.Module:
    """The module of a folder, read block by block as the walk does."""
    found = open_model(folder, **options)
    assert found.checkpoint is not None
    for name, block in found.blocks().items():
        found.checkpoint.materialise(block, name)
    return found.module


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A folder of bit masks, beside the `master` that it was made from."""
    save(pruned(), tmp_path / "master")
    export(tmp_path / "master", "bitmask", tmp_path / "masked")
    return tmp_path / "masked"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("mixtral", torch.float16), ("gpt_oss", torch.bfloat16), ("qwen3_vl_moe", torch.bfloat16)]
)
def test_a_pruned_model_comes_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(pruned(kind, dtype), tmp_path / "master", max_shard_size=60_000)
    export(tmp_path / "master", "bitmask", tmp_path / "masked", ["bitmask.max_shard_size=60000"])
    same_module(opened(tmp_path / "masked"), opened(tmp_path / "master"))
    assert sum(path.stat().st_size for path in (tmp_path / "masked").glob("*.safetensors")) < 0.85 * sum(
        path.stat().st_size for path in (tmp_path / "master").glob("*.safetensors")
    )


def test_a_pruned_weight_takes_a_bit_an_input_and_its_values(masked: Path) -> None:
    dense, stored = tensors_in(masked.with_name("master")), tensors_in(masked)
    for name in of_blocks(masked.with_name("master")):
        weight = dense[name]
        assert zero_share(weight) == 0.5
        assert stored[name].tolist() == weight[weight != 0].tolist()
        assert stored[f"{name}_bitmask"].shape == (len(weight), weight.shape[1] // 8)
        assert stored[name].nbytes + stored[f"{name}_bitmask"].nbytes == weight.nbytes * (1 / 16 + 1 / 2)
    others = [name for name, tensor in dense.items() if ".layers." not in name or tensor.ndim == 1]
    assert all(torch.equal(stored[name], dense[name]) for name in others)


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W3A16_G32", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "W4A16_G32_ASYM"])
def test_codes_come_back_bit_for_bit(scheme: str, tmp_path: Path) -> None:
    save(pruned_and_quantized(scheme), tmp_path / "master")
    if scheme.endswith("ASYM"):  # zero is another code in each group
        assert Bitmask().refuse(source_of(tmp_path / "master")) != []
        return
    export(tmp_path / "master", "bitmask", tmp_path / "masked")
    module = opened(tmp_path / "masked", dtype=torch.float32)
    assert isinstance(module.get_submodule(UP), QuantLinear)
    same_module(module, opened(tmp_path / "master", dtype=torch.float32))


def test_a_denoiser_comes_back_in_its_pipeline(tmp_path: Path) -> None:
    pipeline = classes()
    for name, parameter in pipeline.transformer.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            half_zero(parameter)
    pipeline.save_pretrained(tmp_path / "master")
    export(tmp_path / "master", "bitmask", tmp_path / "masked")
    before, after = (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors" for name in ("master", "masked"))
    assert after.stat().st_size < 0.7 * before.stat().st_size
    same_module(open_model(tmp_path / "masked").module, pipeline.transformer)
    with pytest.raises(ValueError, match=r"Unknown quantization type, got aerogel|stored as bit masks"):  # the latter once registered
        type(pipeline.transformer).from_pretrained(tmp_path / "masked/transformer")


def test_what_opens_models_opens_it(masked: Path, tmp_path: Path) -> None:
    save(open_model(masked, lazy=False), tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    export(masked, "compressed_tensors", tmp_path / "dense")
    for folder in (tmp_path / "again", tmp_path / "dense"):
        after, before = tensors_in(folder), tensors_in(masked.with_name("master"))
        assert all(torch.equal(after[name], before[name]) for name in before)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    same_module(plain, transformers.AutoModelForCausalLM.from_pretrained(masked.with_name("master"), dtype=torch.bfloat16))
    export(masked, "bitmask", tmp_path / "twice")
    assert all(torch.equal(tensor, tensors_in(masked)[name]) for name, tensor in tensors_in(tmp_path / "twice").items())
    aerogel.compress(masked, {"steps": [{"rtn": {"scheme": "W8A16_G32"}}]}, output=tmp_path / "quantized", measures=[])
    assert isinstance(open_model(tmp_path / "quantized").module.get_submodule(UP), QuantLinear)


@pytest.mark.parametrize("scheme", [None, "W4A16_G32"])
def test_transformers_refuses_it(scheme: str | None, tmp_path: Path) -> None:
    """Also where our quantization_config is unknown, which transformers passes over with a warning."""
    save(pruned() if scheme is None else pruned_and_quantized(scheme), tmp_path / "master")
    export(tmp_path / "master", "bitmask", tmp_path / "masked")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    aerogel.register_transformers()
    with pytest.raises(AerogelError, match="aerogel export FOLDER --format compressed_tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "masked")


def test_a_dense_folder_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "dense")
    with pytest.raises(AerogelError, match="no weight of it would be smaller; prune it first"):
        export(tmp_path / "dense", "bitmask", tmp_path / "masked")
    assert not (tmp_path / "masked").exists()


def test_a_weight_becomes_dense_when_it_is_asked_for(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    dense = bitmask._dense

    def watched(*args: Any, **named: Any) -> Tensor:
        asked.append(named["label"])
        return dense(*args, **named)

    monkeypatch.setattr(bitmask, "_dense", watched)
    found = open_model(masked)
    assert asked == []
    assert found.checkpoint is not None
    found.checkpoint.materialise(found.module.get_submodule(UP), UP)
    assert asked == [f"{masked}: {UP_WEIGHT}"]


UP_WEIGHT = f"{UP}.weight"
MASK = f"{UP_WEIGHT}_bitmask"


def flipped(mask: Tensor) -> Tensor:
    changed = mask.clone()
    changed[0, 0] ^= 1
    return changed


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor | None]], str]] = {
    "a flipped bit": (lambda found: {MASK: flipped(found[MASK])}, "its mask has"),
    "a value less": (lambda found: {UP_WEIGHT: found[UP_WEIGHT][:-1].clone()}, "its mask has"),
    "no mask": (lambda found: {MASK: None}, f"{UP_WEIGHT} has no {MASK}"),
    "no values": (lambda found: {UP_WEIGHT: None}, f"{MASK} has no {UP_WEIGHT}"),
    "a mask of another shape": (lambda found: {MASK: found[MASK][:, 1:].clone()}, r"_bitmask is \[128, 7\].* expected \[128, 8\]"),
    "a mask of another dtype": (lambda found: {MASK: found[MASK].to(torch.int8)}, "of torch.int8, expected .* of torch.uint8"),
    "values in a matrix": (lambda found: {UP_WEIGHT: found[UP_WEIGHT][None]}, r"is \[1, 4096\] .* expected \[4096\]"),
    "values of integers": (
        lambda found: {UP_WEIGHT: found[UP_WEIGHT].view(torch.int16)},
        "is torch.int16, the model expects",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(damage: str, masked: Path) -> None:
    change_of, said = DAMAGES[damage]
    change(masked, change_of(tensors_in(masked)))
    with pytest.raises(AerogelError, match=said) as raised:
        opened(masked)
    assert str(masked) in str(raised.value)
    assert "up_proj.weight" in str(raised.value)
    assert "\n" not in str(raised.value)
    run = CliRunner().invoke(app, ["export", str(masked), "--format", "compressed_tensors", "--output", str(masked.with_name("out"))])
    assert run.exit_code == 2
    assert "up_proj.weight" in run.output.replace("\n", "")
    assert not masked.with_name("out").exists()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"shape": [128]}, "shape"),
        ({"shape": [128, 0]}, "shape"),
        ({"shape": [128, 64, 1]}, "expected"),
        ({"shape": [2**31, 2**31]}, "expected"),
        ({"shape": "128"}, "shape"),
        ({"shape": [128, 64], "bits": 4}, "expected"),
        ({"shape": [128, 8, 8], "bits": 4}, "two dimensions"),
        ([], "tensors"),
    ],
)
def test_a_damaged_config_is_named(told: Any, said: str, masked: Path) -> None:
    path = masked / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"]["tensors"][UP_WEIGHT] = told
    path.write_text(json.dumps(config))
    with pytest.raises(AerogelError, match=said):
        open_model(masked)


def test_damaged_offsets_of_experts_are_named(tmp_path: Path) -> None:
    save(pruned("gpt_oss"), tmp_path / "master")
    export(tmp_path / "master", "bitmask", tmp_path / "masked")
    name = next(name for name in tensors_in(tmp_path / "masked") if name.endswith("_offsets"))
    change(tmp_path / "masked", {name: tensors_in(tmp_path / "masked")[name] + 10**6})
    with pytest.raises(AerogelError, match="begin at"):
        opened(tmp_path / "masked")
    shutil.rmtree(tmp_path / "masked")
