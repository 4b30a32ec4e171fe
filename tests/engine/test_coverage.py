"""Coverage names what is in codes and what is not, and the profile of published code leaves just what that code leaves."""

from __future__ import annotations

import pytest
from torch import nn

import aerogel
from aerogel.model.calls import Call
from tests.methods.diffusion.test_fsc import calls
from tests.tiny import FAMILIES, VARIANTS

RELEASED = {
    "name": "released",
    "steps": [
        {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear", "Conv2d"], "ignore": ["@released_tfmq"]}},
        {"fsc": {"scope": "all", "ignore": ["@released_tfmq_inputs"]}},
    ],
}


def steps_of(family: str) -> list[Call]:
    if family == "unet":
        return calls()
    (call,) = (FAMILIES | VARIANTS)[family].calls(1)
    return [call]


@pytest.mark.parametrize("family", ["unet", "unet_pixels"])
def test_what_the_released_code_leaves_in_float(family: str) -> None:
    network = (FAMILIES | VARIANTS)[family].build()
    layers = [name for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    shortcuts = {name for name in layers if name.endswith("conv_shortcut")}
    strided = {name for name in layers if "downsamplers" in name}
    attention = {name for name in layers if ".attentions." in name} if family == "unet_pixels" else set()
    assert shortcuts
    assert strided
    coverage = aerogel.compress(network, RELEASED, samples=steps_of(family), measures=()).facts["coverage"]
    left = {"conv_in", "conv_out", "time_embedding.linear_1"} | shortcuts | strided | attention
    assert set(coverage["unquantized_weights"]) == left
    more = {"down_blocks.0.resnets.0.conv1", "time_embedding.linear_2"}
    assert set(coverage["unquantized_inputs"]) == left | more
    assert coverage["layers"] == len(layers)
    assert coverage["weights"] == {"int8": len(layers) - len(left)}
    (steps,) = coverage["inputs"]
    assert steps == "int8, one range a step"


def test_everything_is_covered_and_operands_are_named() -> None:
    recipe = {
        "steps": [
            {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear", "Conv2d"]}},
            {"attention_quant": {}},
            {"fsc": {"scope": "all"}},
        ]
    }
    coverage = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=calls(), measures=()).facts["coverage"]
    assert coverage["unquantized_weights"] == coverage["unquantized_inputs"] == []
    assert coverage["attentions"]
    assert all(".attn" in name for name in coverage["attentions"])
