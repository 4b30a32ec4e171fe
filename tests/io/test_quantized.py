"""quantization_config: what we write the library reads, what we read is what was written."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

import aerogel.layers
from aerogel.errors import AerogelError
from aerogel.io.quantized import assignments, attach, describe, linears
from aerogel.layers.linear import QuantLinear
from aerogel.layers.scaled_input import ScaledInput
from aerogel.numerics.scheme import Scheme
from tests.saved import SchemeOf, round_to_nearest
from tests.tiny import FAMILIES

SCHEMES = ["W2A16_G32", "W3A16_G32_ASYM", "W4A16_CHANNEL", "W8A16_G64", "W8A8", "W8A8_STATIC", "W4A8_G32", "FP8_DYNAMIC", "FP8_STATIC"]
SCHEMES += ["NVFP4A16", "MXFP4A16"]


def llama(scheme: str | SchemeOf) -> nn.Module:
    return round_to_nearest(FAMILIES["llama"].build(), scheme)


def mixed(name: str) -> str | None:
    """One layer in another scheme, the down projections in a third, the head and one gate in float."""
    if name == "lm_head" or name.endswith("0.mlp.gate_proj"):
        return None
    return "W8A8" if name.endswith("down_proj") else "W8A16_G32" if ".0." in name else "W4A16_G32_ASYM"


def shapes(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_accepts_what_we_write_and_we_read_back_the_scheme(scheme: str) -> None:
    module = llama(scheme)
    config = describe(module)
    assert config is not None
    theirs = QuantizationConfig.model_validate(config)
    assert theirs.quantization_status == "compressed"
    assert theirs.ignore == ["lm_head"]
    parsed = Scheme.parse(scheme)
    for assigned in assignments(config, linears(FAMILIES["llama"].build())).values():
        assert (assigned.scheme.weights, assigned.scheme.inputs) == (parsed.weights, parsed.inputs)
        assert Scheme.parse(assigned.scheme.name) == assigned.scheme


def test_every_float_linear_is_named_in_ignore_and_every_override_in_a_group() -> None:
    module = llama(mixed)
    config = describe(module)
    assert config is not None
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.0.mlp.gate_proj", "lm_head"]
    targets = {target: group["weights"]["num_bits"] for group in config["config_groups"].values() for target in group["targets"]}
    every = [name for name, part in module.named_modules() if isinstance(part, QuantLinear)]
    assert sorted(targets) == sorted(every)
    assert targets["model.layers.0.self_attn.q_proj"] == 8
    assert targets["model.layers.1.self_attn.q_proj"] == 4
    QuantizationConfig.model_validate(config)


def test_routers_that_keep_their_own_weight_are_ignored_by_name() -> None:
    module = round_to_nearest(FAMILIES["qwen3_moe"].build(), lambda name: "W4A16_G32" if "self_attn" in name else None)
    config = describe(module)
    assert config is not None
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"} <= set(config["ignore"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attach_builds_what_describe_saw(device: str) -> None:
    full = llama(mixed)
    config = describe(full)
    assert config is not None
    empty = FAMILIES["llama"].build().to(device)
    attach(empty, config)
    assert shapes(empty) == shapes(full)
    assert describe(empty) == config


def scaled_block() -> tuple[nn.Module, dict[str, Any]]:
    """Return a block with a scaled input, and its description."""
    block = llama(mixed).get_submodule("model.layers.0")
    down = block.get_submodule("mlp.down_proj")
    assert isinstance(down, QuantLinear)
    block.set_submodule("mlp.down_proj", ScaledInput(down, torch.ones(down.in_features)))
    description = describe(block)
    assert description is not None
    return block, description


def test_a_block_describes_itself_with_its_scaled_inputs_and_comes_back() -> None:
    block, description = scaled_block()
    assert description["replacements"] == {"mlp.down_proj": {"kind": "scaled_input"}}
    assert description["quant_method"] == "aerogel"  # no other reader may take it for plain compressed-tensors
    again = FAMILIES["llama"].build().get_submodule("model.layers.0")
    attach(again, description)
    assert shapes(again) == shapes(block)
    assert describe(again) == description


def test_lists_of_earlier_releases_are_read() -> None:
    _, description = scaled_block()
    earlier = {key: value for key, value in description.items() if key != "replacements"} | {"scaled_inputs": ["mlp.down_proj"]}
    again = FAMILIES["llama"].build().get_submodule("model.layers.0")
    attach(again, earlier)
    assert describe(again) == description


@pytest.mark.parametrize("kind", ["abacus", "layout", "../errors", "os.path"])
def test_unknown_kinds_of_layers_are_refused(kind: str) -> None:
    config = describe(llama("W4A16_G32"))
    assert config is not None
    with pytest.raises(AerogelError, match="of the kind"):
        attach(FAMILIES["llama"].build(), config | {"replacements": {"model.layers.0.mlp": {"kind": kind}}})


def test_a_new_kind_of_layer_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubled.py").write_text(
        "from torch import nn\n"
        "from aerogel.layers.replacement import Replacement\n"
        "class Doubled(Replacement):\n"
        "    def __init__(self, inner, times):\n"
        "        super().__init__()\n"
        "        self.inner, self.times = inner, times\n"
        "    def describe(self):\n"
        "        return {'times': self.times}\n"
        "    @classmethod\n"
        "    def rebuild(cls, layer, told, assigned):\n"
        "        return cls(layer, told['times'])\n"
    )
    monkeypatch.setattr("aerogel.layers.replacement._FOLDER", tmp_path)
    monkeypatch.setattr(aerogel.layers, "__path__", [*aerogel.layers.__path__, str(tmp_path)])
    doubled = importlib.import_module("aerogel.layers.doubled").Doubled
    block = FAMILIES["llama"].build().get_submodule("model.layers.0")
    block.set_submodule("mlp.up_proj", doubled(block.get_submodule("mlp.up_proj"), 2))
    description = describe(block)
    assert description is not None
    assert description["replacements"] == {"mlp.up_proj": {"kind": "doubled", "times": 2}}
    again = FAMILIES["llama"].build().get_submodule("model.layers.0")
    attach(again, description)
    assert isinstance(again.get_submodule("mlp.up_proj"), doubled)


def test_a_float_module_has_no_description() -> None:
    assert describe(FAMILIES["llama"].build()) is None


def test_a_linear_that_the_format_cannot_hold_is_named() -> None:
    module = llama(lambda name: "W4A16_G48" if name.endswith("0.mlp.up_proj") else None)
    with pytest.raises(AerogelError, match=r"layers\.0\.mlp\.up_proj in W4A16_G48: 64 inputs do not divide"):
        describe(module)


def test_names_win_over_patterns_and_patterns_over_classes() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}

    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": group(8, "Linear"), "b": group(4, r"re:.*\.v$"), "c": group(2, "1.v")},
        "ignore": ["0.q", "re:2"],
    }
    found = assignments(config, ["0.q", "0.v", "1.q", "1.v", "2.q"])
    assert {name: assigned.scheme.bits for name, assigned in found.items()} == {"0.v": 4, "1.q": 8, "1.v": 2}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq"}, "quant_method='awq'"),
    ({"config_groups": {"g": ["Linear"]}}, "g is not a group"),
    ({"weights": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}, "strategy 'attn_head'"),
    ({"weights": {"num_bits": 16, "strategy": "channel"}}, "int16"),
    ({"format": "marlin-24"}, "stored as marlin-24"),
]


@pytest.mark.parametrize(("change", "word"), BROKEN)
def test_what_cannot_be_run_is_an_error_that_names_it(change: dict[str, Any], word: str) -> None:
    config = copy.deepcopy(describe(llama("W4A16_G32")))
    assert config is not None
    top = change.keys() & {"quant_method", "config_groups"}
    (config if top else config["config_groups"]["group_0"]).update(change)
    with pytest.raises(AerogelError, match=word):
        attach(FAMILIES["llama"].build(), config)
