"""The plan names fused sets whose layers get unlike schemes: it is said, and the recipe runs."""

from __future__ import annotations

from typing import Any

import pytest

import aerogel
from aerogel.engine.planning import plan
from aerogel.model import network as networks
from aerogel.model.network import Network
from tests.tiny import FAMILIES, opened

W4, W8 = "W4A16_G32", "W8A16_CHANNEL"
END = ": engines that load them as one tensor (vLLM) refuse or misread this; give them one scheme"


def remarks(model: str | Network, *steps: dict[str, Any]) -> list[str]:
    network = opened(model) if isinstance(model, str) else model
    made = plan(network, {"steps": list(steps)}, flops_a_second=lambda: 1e9)
    assert not made.problems
    return [line for line in made.remarks if "fused set" in line or "one tensor" in line]


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        (
            "llama",
            {"overrides": {"*k_proj": W8}},
            [f"q_proj, k_proj, v_proj of model.layers.0.self_attn and 1 more like it have {W4}, {W8}, {W4}"],
        ),
        ("llama", {"ignore": ["*.1.mlp.up_proj"]}, [f"gate_proj, up_proj of model.layers.1.mlp have {W4}, no scheme"]),
        (
            "llama",
            {"ignore": ["*.0.*v_proj"], "overrides": {"*.1.*v_proj": W8}},
            [
                f"q_proj, k_proj, v_proj of model.layers.0.self_attn have {W4}, {W4}, no scheme",
                f"q_proj, k_proj, v_proj of model.layers.1.self_attn have {W4}, {W4}, {W8}",
            ],
        ),
        ("mixtral", {"overrides": {"*w2": W8}}, [f"the experts of model.layers.0.mlp.experts and 1 more like it have {W4}, {W8}"]),
        ("mixtral", {"ignore": ["*.1.mlp.experts.2.*"]}, [f"the experts of model.layers.1.mlp.experts have {W4}, no scheme"]),
        (
            "deepseek_v3",
            {"ignore": ["*kv_a*", "*shared_experts.up*"]},
            [
                f"q_a_proj, kv_a_proj_with_mqa of model.layers.0.self_attn and 1 more like it have {W4}, no scheme",
                f"gate_proj, up_proj of model.layers.1.mlp.shared_experts have {W4}, no scheme",
            ],
        ),
    ],
)
def test_a_set_with_several_schemes_is_named(family: str, options: dict[str, Any], expected: list[str]) -> None:
    assert remarks(family, {"rtn": {"scheme": W4, **options}}) == [line + END for line in expected]


def test_schemes_of_several_steps_count() -> None:
    steps = [{"rtn": {"scheme": W8, "targets": ["*q_proj"]}}, {"rtn": {"scheme": W4}}]
    assert remarks("llama", *steps) == [f"q_proj, k_proj, v_proj of model.layers.0.self_attn and 1 more like it have {W8}, {W4}, {W4}{END}"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"overrides": {"*down_proj": W8, "*o_proj": W8}}),
        ("llama", {"overrides": {"*.layers.0.*": W8}}),
        ("mixtral", {"ignore": ["*self_attn*"]}),
        ("dit", {"overrides": {"*to_k": W8}}),  # what opens denoisers loads layer by layer
    ],
)
def test_sets_of_one_scheme_are_not(family: str, options: dict[str, Any]) -> None:
    assert not remarks(family, {"rtn": {"scheme": W4, **options}})


def test_one_scheme_for_all_needs_no_look_at_the_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    network = opened("llama")
    monkeypatch.setattr(networks, "fused_sets_of", lambda *_: pytest.fail("the structure was looked at"))
    assert not remarks(network, {"rtn": {"scheme": W4}})


def test_blocks_whose_sets_are_not_known_are_named_where_they_would_share_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not remarks("llama", {"rtn": {"scheme": "NVFP4A16"}})
    monkeypatch.setattr(networks, "fused_sets_of", lambda *_: {})
    (line,) = remarks("llama", {"rtn": {"scheme": "NVFP4A16"}})
    assert line.startswith("the fused sets of model.layers.0 and 1 more are not known, as made-up inputs do not run them: each layer gets")
    assert not remarks("llama", {"rtn": {"scheme": "MXFP4A16"}})


def test_such_a_recipe_runs() -> None:
    recipe = {"steps": [{"rtn": {"scheme": "NVFP4A16", "overrides": {"*k_proj": W8}, "ignore": ["*gate_proj"]}}]}
    module = FAMILIES["llama"].build()
    journal = aerogel.compress(module, recipe, samples=FAMILIES["llama"].calls(1), measures=()).journal
    assert {line["name"]: line["scheme"] for line in journal}["model.layers.0.self_attn.k_proj"] == W8
