"""A pattern of a recipe that matches nothing is refused by the plan, with the nearest names."""

from __future__ import annotations

from typing import Any

import pytest

from aerogel import catalog
from aerogel.engine.opening import open_model
from aerogel.engine.patterns import unmatched
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.recipe import Recipe
from tests.tiny import FAMILIES


def problems(family: str, method: str, **options: Any) -> tuple[str, ...]:
    scheme = {"scheme": "W8A16_CHANNEL"} if method == "rtn" else {}
    return plan(FAMILIES[family].build(), {"steps": [{method: {**scheme, **options}}]}, flops_a_second=lambda: 1e9).problems


@pytest.mark.parametrize(
    ("option", "pattern", "advice"),
    [
        ("ignore", "*.o_prj", "no layer matches '*.o_prj' in ignore; did you mean *.o_proj or"),
        ("ignore", "oproj", "no layer matches 'oproj' in ignore; did you mean o_proj or"),
        ("ignore", "*.mpl.*", "did you mean *.mlp.*?"),
        ("ignore", "self_attn", "model.layers.0.self_attn is a module with layers in it: write '*.self_attn.*' for those"),
        ("ignore", "model.layers.1", "write 'model.layers.1.*' for those"),
        ("ignore", "re:layers", "no layer matches 're:layers' in ignore, from the start of its name; names are like lm_head, model.embed"),
        ("ignore", "transformer.h.0.c_attn", "names are like lm_head, model.embed_tokens, model.layers.*.input_layernorm, "),
        ("targets", "*.norm", "no layer matches '*.norm' in targets"),
        ("targets", "model.layers.0.mlp.up", "did you mean model.layers.0.mlp.up_proj?"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_names(option: str, pattern: str, advice: str) -> None:
    given = [pattern] if option == "ignore" else ["*.q_proj", pattern]
    (line,) = problems("llama", "rtn", **{option: given})
    assert line.startswith("rtn: ")
    assert advice in line
    assert "\n" not in line


def test_schemes_of_layers_that_are_not_there_are_refused() -> None:
    (line,) = problems("llama", "rtn", overrides={"*.q_proj": "W4A16_CHANNEL", "*.down": "W8A16_CHANNEL"})
    assert line == "rtn: no layer matches '*.down' in overrides; did you mean *.down_proj?"


@pytest.mark.parametrize(
    ("method", "option", "pattern", "advice"),
    [
        ("kv_cache_int", "ignore", "*.self_atn", "no attention matches '*.self_atn' in ignore; did you mean *.self_attn?"),
        ("kivi", "ignore", "*.q_proj", "no attention matches '*.q_proj' in ignore"),
        ("attention_quant", "ignore", "model.layers.9.self_attn", "no attention matches 'model.layers.9.self_attn' in ignore"),
        ("awq", "unclipped", "*.q_prj", "no layer matches '*.q_prj' in unclipped; did you mean *.q_proj"),
        ("smoothquant", "targets", "*.down", "no layer matches '*.down' in targets; did you mean *.down_proj?"),
        ("magnitude", "ignore", "*.down", "no layer matches '*.down' in ignore; did you mean *.down_proj?"),
        ("fsc", "ignore", "*.to_qq", "no layer matches '*.to_qq' in ignore; did you mean *.to_q"),
        ("split_shortcut", "ignore", "*.to_qq", "no layer matches '*.to_qq' in ignore; did you mean *.to_q"),
        ("activation_ranges", "targets", "*.to_qq", "no layer matches '*.to_qq' in targets; did you mean *.to_q"),
    ],
)
def test_every_option_of_patterns_is_looked_at(method: str, option: str, pattern: str, advice: str) -> None:
    network = open_model(FAMILIES["dit" if "to_q" in pattern else "llama"].build())
    (step,) = Recipe.parse({"steps": [{method: {option: [pattern]}}]}).steps
    (line,) = unmatched(network, step)
    assert advice in line


def test_no_other_option_has_patterns() -> None:
    """A new option of names of modules has to be looked at too."""
    known = {"targets", "ignore", "overrides", "unclipped"}
    for name in catalog.names("methods"):
        for option in catalog.options(catalog.find("methods", name)):
            assert option.name in known or "tuple[str" not in option.type, (name, option.name)


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("llama", ["*.o_proj", "re:.*mlp", "model.layers.0.self_attn.q_proj", "down_proj", "embed_tokens"]),
        ("qwen3_moe", ["mlp.gate", "*.experts.0.*"]),
        ("dit", ["lm_head"]),  # the default, which is there for language models
    ],
)
def test_what_matches_something_is_taken(family: str, patterns: list[str]) -> None:
    assert problems(family, "rtn", ignore=patterns) == ()


def test_kinds_of_layers_may_be_absent() -> None:
    assert problems("llama", "rtn", targets=["Linear", "Conv2d"]) == ()


def test_modules_of_other_kinds_may_be_named() -> None:
    assert problems("dit", "attention_quant", ignore=["transformer_blocks.0.attn1"]) == ()
    (line,) = problems("dit", "attention_quant", ignore=["transformer_blocks.0.atn"])
    assert "did you mean transformer_blocks.0.attn1?" in line


def test_a_broken_regular_expression_is_one_line() -> None:
    with pytest.raises(AerogelError, match=r"pattern 're:\[' is not a regular expression \(unterminated character set"):
        problems("llama", "rtn", ignore=["re:["])
