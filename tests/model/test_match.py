"""Patterns mean what their docstring says, and never a part of a word."""

from __future__ import annotations

import pytest
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.match import matches


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "proj", False),
        ("model.layers.0.block_sparse_moe.experts.1.w1", "experts", False),
        ("model.layers.0.block_sparse_moe.experts.1.w1", "moe.experts.1.w1", False),
        ("model.layers.0.mlp.gate_proj", "*.mlp.gate", False),
        ("model.layers.0.mlp.gate", "*.mlp.gate", True),
        ("model.layers.10.mlp.up_proj", "model.layers.1.*", False),
        ("model.layers.1.mlp.up_proj", "model.layers.[0-3].*", True),
        ("model.layers.3.self_attn.q_proj", r"re:.*\.(q|k)_proj$", True),
        ("model.layers.3.self_attn.v_proj", r"re:.*\.(q|k)_proj$", False),
    ],
)
def test_names(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, (pattern,)) is expected


def test_class_names_need_the_module() -> None:
    assert matches("anything", ("Linear",), nn.Linear(1, 1))
    assert not matches("anything", ("Linear",), nn.Conv2d(1, 1, 1))
    assert not matches("anything", ("Linear",))


def test_no_pattern_means_nothing() -> None:
    assert not matches("lm_head", ())


def test_an_expression_that_explodes_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"^pattern 're:\(a\|a\)\*\$' takes too long on 'aaaa.*repetitions inside of repetitions$"):
        matches("a" * 60 + "b", ("re:(a|a)*$",))
    assert not matches("a" * 60 + "!", ("re:(a+)+$",))


@pytest.mark.parametrize("pattern", ["re:[", "re:*", "re:" + "(" * 5000 + ")" * 5000, "re:a{1000}{1000}"])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(AerogelError, match="is not a regular expression"):
        matches("name", (pattern,))
