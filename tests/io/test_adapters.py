"""LoRA adapters: merged as PEFT merges them, named where they are not, refused where they cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aerogel
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.io.source import locate
from tests.tiny import FAMILIES

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, rank: int = 4, extra: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter as PEFT saves it, for two layers of a model."""
    folder, generator = base.parent / "adapter", torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    weights, tensors = load_file(base / "model.safetensors"), dict(extra or {})
    for name in LAYERS:
        outputs, inputs = weights[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(base: Path, folder: Path, scaling: float) -> dict[str, Tensor]:
    """W + scaling * B A, literally."""
    weights, tensors = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    for name in LAYERS:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scaling * (b @ a)
    return weights


def opened(folder: Path) -> dict[str, Tensor]:
    network = aerogel.load(folder, lazy=False, merge_adapter=True)
    return dict(network.module.state_dict())


@pytest.mark.parametrize(("config", "scaling"), [({}, 2.0), ({"use_rslora": True}, 8 / math.sqrt(4)), ({"lora_alpha": 3}, 0.75)])
def test_the_product_is_added(base: Path, config: dict[str, Any], scaling: float) -> None:
    folder = adapter(base, **config)
    found = opened(folder)
    for name, tensor in merged(base, folder, scaling).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_patterns_name_layers_by_their_ends(base: Path) -> None:
    found, folder = {}, adapter(base, alpha_pattern={"q_proj": 16.0})
    found = opened(folder)
    for name, scaling in zip(LAYERS, (4.0, 2.0), strict=True):
        torch.testing.assert_close(found[f"{name}.weight"], merged(base, folder, scaling)[f"{name}.weight"], rtol=1e-5, atol=1e-6)


def test_rows_of_dora_have_a_given_length(base: Path) -> None:
    magnitude = torch.rand(64) + 0.5
    folder = adapter(base, extra={f"base_model.model.{LAYERS[0]}.lora_magnitude_vector.weight": magnitude}, use_dora=True)
    found, plain = opened(folder)[f"{LAYERS[0]}.weight"], merged(base, folder, 2.0)[f"{LAYERS[0]}.weight"]
    torch.testing.assert_close(found.norm(dim=1), magnitude)
    torch.testing.assert_close(found, plain / plain.norm(dim=1, keepdim=True) * magnitude[:, None])


def test_whole_modules_take_the_place_of_the_bases(base: Path) -> None:
    head = torch.randn(128, 64)
    found = opened(adapter(base, extra={"base_model.model.lm_head.weight": head}))
    assert torch.equal(found["lm_head.weight"], head)


def test_a_run_starts_from_the_merged_weights(base: Path, tmp_path: Path) -> None:
    folder = adapter(base)
    save_file(merged(base, folder, 2.0), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    recipe = {"steps": [{"rtn": {"scheme": "W4A16_G16"}}]}
    source = locate(folder, merge_adapter=True)
    assert any("the LoRA adapter adapter of" in line and "merged into 2 layers" in line for line in plan(source, recipe).remarks)
    aerogel.compress(source, recipe, output=tmp_path / "ours", measures=())
    aerogel.compress(tmp_path, recipe, output=tmp_path.parent / f"{tmp_path.name}-theirs", measures=())
    ours = load_file(tmp_path / "ours/model.safetensors")
    theirs = load_file(tmp_path.parent / f"{tmp_path.name}-theirs/model.safetensors")
    different = sum(int((ours[name] != tensor).sum()) for name, tensor in theirs.items() if name.endswith("_packed"))
    assert different <= 2  # sums of other orders may turn a code


def test_an_adapter_alone_is_named(base: Path) -> None:
    folder = adapter(base)
    with pytest.raises(AerogelError, match=f"is an adapter of {base}; add --merge-adapter"):
        aerogel.load(folder)


BROKEN = [
    ({"peft_type": "IA3"}, "of type IA3; only LoRA is merged here"),
    ({"r": 0}, "r: Input should be greater than or equal to 1"),
    ({"base_model_name_or_path": None}, "does not name its base model"),
    ({"base_model_name_or_path": "/nowhere"}, "is no folder"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"),
]


@pytest.mark.parametrize(("config", "words"), BROKEN)
def test_what_cannot_be_merged_is_refused(base: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        opened(adapter(base, **config))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.7.self_attn.q_proj.lora_A.weight", (4, 64), "has one of two matrices"),
        ("model.layers.7.self_attn.q_proj.weight", (64, 64), "which .* does not have"),
        ("model.embed_tokens.weight", (3, 64), "the base has .128, 64."),
        ("model.layers.0.mlp.up_proj.lora_C.weight", (4, 64), "no part of LoRA for linear layers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        opened(adapter(base, extra={f"base_model.model.{name}": torch.zeros(shape)}))


def test_a_module_with_an_adapter_beside_its_weight_is_refused() -> None:
    """As PEFT wraps a layer, merged or not."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.active_adapters = layer, ["default"]

    module: Any = FAMILIES["llama"].build()
    module.model.layers[0].self_attn.q_proj = Wrapped(module.model.layers[0].self_attn.q_proj)
    with pytest.raises(AerogelError, match=r"layers\.0\.self_attn\.q_proj has an adapter beside its weight: merge it before"):
        aerogel.compress(module, {"steps": [{"rtn": {"scheme": "W4A16_G16"}}]}, measures=())


def test_integers_are_no_adapter(base: Path) -> None:
    folder = adapter(base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(AerogelError, match=r"adapter_model\.safetensors: base_model\..* is torch\.int32, expected floats"):
        aerogel.load(locate(folder, merge_adapter=True), lazy=False)
