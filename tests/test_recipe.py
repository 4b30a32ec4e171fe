"""Recipes: strict, typed, and resolved to a form that reads back."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.methods.base import BlockMethod, Method, RuntimePolicy
from aerogel.methods.quantization.gptq import Gptq
from aerogel.numerics.scheme import PerGroup, Scheme
from aerogel.recipe import Recipe, Step

GPTQ: dict[str, Any] = {"name": "mine", "steps": [{"gptq": {"scheme": "W4A16_G64", "percdamp": 0.02}}]}


def test_steps_become_methods() -> None:
    (step,) = Recipe.parse(GPTQ).steps
    assert step.name == "gptq"
    assert isinstance(step.method, Gptq)
    assert step.method.percdamp == 0.02
    assert str(step.method.scheme) == "W4A16_G64"
    with pytest.raises(FrozenInstanceError):
        step.method.percdamp = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", catalog.names("recipes"))
def test_shipped_recipes_are_short_and_read_back(name: str) -> None:
    path = catalog.card("recipes", name).path
    assert len(path.read_text().splitlines()) <= 20
    recipe = Recipe.parse(name)
    assert recipe.name == name
    assert all(isinstance(step.method, BlockMethod | Method | RuntimePolicy) for step in recipe.steps)
    assert Recipe.parse(recipe.as_dict()) == recipe


def test_resolved_recipe_spells_every_knob_in_plain_values() -> None:
    resolved = Recipe.parse(GPTQ).as_dict()
    options = resolved["steps"][0]["gptq"]
    assert set(options) == {option.name for option in catalog.options(Gptq)}
    assert options["scheme"] == "W4A16_G64"
    assert options["ignore"] == ["lm_head"]
    assert yaml.safe_load(yaml.safe_dump(resolved)) == resolved


def test_lists_stand_for_tuples_and_mappings_for_schemes() -> None:
    options = {"scheme": {"preset": "W4A16", "group": 32}, "ignore": ["lm_head", "re:.*down.*"], "overrides": {"*.o_proj": "W8A16"}}
    method = Recipe.parse({"steps": [{"gptq": options}]}).steps[0].method
    assert isinstance(method, Gptq)
    assert isinstance(method.scheme, Scheme)
    assert method.scheme.weights.granularity == PerGroup(32)
    assert method.ignore == ("lm_head", "re:.*down.*")
    assert Scheme.parse(method.overrides["*.o_proj"]).bits == 8


def test_files_mappings_and_recipes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("steps:\n  - gptq: {scheme: W3A16_G64, percdamp: 1e-3}\n  - rtn:\n")
    recipe = Recipe.parse(path)
    assert recipe.name == "own"
    assert [step.name for step in recipe.steps] == ["gptq", "rtn"]
    assert recipe.as_dict()["steps"][0]["gptq"]["percdamp"] == 0.001
    assert Recipe.parse(str(path)) == recipe == Recipe.parse(recipe)


def test_recipes_can_be_made_of_values() -> None:
    recipe = Recipe("made", (Step("gptq", Gptq(scheme=Scheme.parse("W8A16_CHANNEL"))),))
    assert Recipe.parse(recipe) is recipe
    assert Recipe.parse(recipe.as_dict()) == Recipe.parse(recipe, ["gptq.scheme=W8A16_CHANNEL"])


@pytest.mark.parametrize(
    ("override", "option", "value"),
    [
        ("gptq.scheme=W3A16", "scheme", "W3A16"),
        ("gptq.percdamp=5e-2", "percdamp", 0.05),
        ("gptq.true_sequential=true", "true_sequential", True),
        ("gptq.ignore=[lm_head, '*.down_proj']", "ignore", ["lm_head", "*.down_proj"]),
        ("gptq.overrides={'*.o_proj': W8A16}", "overrides", {"*.o_proj": "W8A16"}),
    ],
)
def test_overrides_are_typed(override: str, option: str, value: object) -> None:
    assert Recipe.parse(GPTQ, [override]).as_dict()["steps"][0]["gptq"][option] == value


def test_overrides_leave_the_given_mapping_alone() -> None:
    Recipe.parse(GPTQ, ["gptq.scheme=W3A16"])
    assert GPTQ["steps"][0]["gptq"]["scheme"] == "W4A16_G64"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"steps": [{"gptq": {"shceme": "W4A16"}}]}, r"step 1 \(gptq\): unknown option 'shceme'; did you mean scheme"),
        ({"steps": [{"gpqt": {}}]}, r"step 1: unknown method 'gpqt'; did you mean gptq"),
        ({"steps": [{"gptq": {}, "rtn": {}}]}, r"step 1: a step has one key, the method; got \['gptq', 'rtn'\]"),
        ({"step": []}, r"unknown key 'step'; did you mean steps"),
        ({"name": "x"}, "steps: Field required"),
        ({"steps": []}, "steps: List should have at least 1 item"),
        ({"steps": ["gptq"]}, r"steps\.0: .*dictionary"),
        ({"steps": [{"gptq": {"percdamp": "much"}}]}, r"option 'percdamp': .*number, got 'much'"),
        ({"steps": [{"gptq": {"percdamp": True}}]}, r"option 'percdamp': .*number, got True"),
        ({"steps": [{"gptq": {"ignore": "lm_head"}}]}, r"option 'ignore': .*tuple, got 'lm_head'"),
        ({"steps": [{"gptq": {"scheme": "W5B16"}}]}, r"option 'scheme': unknown scheme 'W5B16'"),
        ({"steps": [{"gptq": {"scheme": 4}}]}, r"option 'scheme': a scheme is a name"),
        ({"steps": [{"gptq": {"overrides": {"*": "W9A16"}}}]}, r"option 'overrides': .*unknown scheme 'W9A16'"),
        ("gptq-w4a61", r"unknown recipe 'gptq-w4a61'; did you mean gptq-w4a16"),
        ("nowhere/own.yaml", r"recipe file nowhere/own\.yaml does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe: Any, message: str) -> None:
    with pytest.raises(AerogelError, match=message) as raised:
        Recipe.parse(recipe)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is not YAML"),
        ("- gptq", "must be a mapping with the keys name and steps"),
        ("steps: [{gptq: {percdamp: 1, percdamp: 2}}]", "key 'percdamp' is given twice"),
        ("steps: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("steps: [{gptq: {}}]\ninclude: other.yaml", "unknown key 'include'"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(AerogelError, match=message) as raised:
        Recipe.parse(path)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AerogelError, match="cannot be read"):
        Recipe.parse(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gptq.shceme=W4A16", "unknown option 'shceme'; did you mean scheme"),
        ("gpqt.scheme=W4A16", "recipe 'mine' has no step 'gpqt'; did you mean gptq"),
        ("gptq.scheme", "expected method.option=value"),
        ("scheme=W4A16", "expected method.option=value"),
        ("gptq.ignore=[", "the value is not YAML"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        Recipe.parse(GPTQ, [override])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("modes", {"ratio": 1.5}, r"option 'ratio': expected a number from 0 to 1, got 1\.5"),
        ("gptq", {"percdamp": -1}, r"option 'percdamp': expected a number from 0 to 1,000,000, got -1"),
        ("gptq", {"percdamp": float("nan")}, r"option 'percdamp': expected a number from 0 to 1,000,000, got nan"),
        ("gptq", {"max_activation_gb": float("inf")}, r"option 'max_activation_gb': expected a number of at least 0, got inf"),
        ("pab", {"first": float("nan")}, r"option 'first': expected a finite number, got nan"),
        ("smoothquant", {"alpha": 2}, r"option 'alpha': expected a number from 0 to 1 or 'search', got 2"),
        ("attention_quant", {"bits": 9}, r"option 'bits': expected a number from 2 to 8, got 9"),
        ("prune_experts", {"ratio": 1.0}, r"option 'ratio': expected a number from 0 to below 1, got 1\.0"),
        ("delta_dit", {"share": 0.0}, r"option 'share': expected a number above 0 and at most 1, got 0\.0"),
        ("toca", {"dense": [0.2, 1.5]}, r"option 'dense': expected a number from 0 to 1, got 1\.5"),
        ("reduced_topk", {"ratio": -0.1}, r"option 'ratio': expected a number from 0 to 1, got -0\.1"),
    ],
)
def test_bounds_hold_in_recipes_and_in_python(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=rf"step 1 \({name}\): {message}$"):
        Recipe.parse({"steps": [{name: options}]})
    with pytest.raises(AerogelError, match=rf"^{name}: {message}$"):
        catalog.find("methods", name)(**options)


def test_not_a_number_is_refused_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: [{gptq: {percdamp: .nan}}]")
    with pytest.raises(AerogelError, match="option 'percdamp': expected a number from 0 to 1,000,000, got nan"):
        Recipe.parse(path)


def test_bounds_leave_types_plain() -> None:
    types = {option.name: option.type for option in catalog.options(catalog.find("methods", "modes"))}
    assert types["ratio"] == "float"
    assert types["power"] == "float | tuple[float, ...]"
    assert types["points"] == "int"


def options_of(recipe: Recipe, option: str) -> list[Any]:
    return [getattr(step.method, option) for step in recipe.steps if step.has(option)]


def test_a_scheme_is_set_in_every_step_that_has_one() -> None:
    recipe = Recipe.parse("smoothquant-w8a8").adjusted(scheme="FP8_DYNAMIC")
    assert options_of(recipe, "scheme") == ["FP8_DYNAMIC", "FP8_DYNAMIC"]
    recipe = Recipe.parse("modes-w4a16").adjusted(scheme="W8A16_G32")
    assert options_of(recipe, "scheme") == ["W8A16_G32"]
    assert [step.name for step in recipe.steps] == ["rtn", "modes"]


def test_targets_are_replaced_and_patterns_to_ignore_added() -> None:
    recipe = Recipe.parse("magnitude-2of4-w4a16").adjusted(targets=["*.mlp.*"], ignore=["*.down_proj", "lm_head"])
    assert options_of(recipe, "targets") == [("*.mlp.*",)] * 2
    assert options_of(recipe, "ignore") == [("lm_head", "*.down_proj")] * 2
    assert options_of(Recipe.parse("magnitude-2of4-w4a16"), "ignore") == [("lm_head",)] * 2


def test_nothing_to_adjust_leaves_a_recipe_alone() -> None:
    recipe = Recipe.parse(GPTQ)
    assert recipe.adjusted() == recipe


MIXED = {"name": "mixed", "steps": [{"rtn": {"scheme": "W8A16", "targets": ["*.mlp.*"]}}, {"gptq": {"scheme": "W4A16"}}]}


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("modes", {"scheme": "W4A16"}, r"recipe 'modes' has no step with the option scheme \(its steps: modes\); leave --scheme out"),
        ("harmonica", {"ignore": ["x"]}, r"has no step with the option ignore \(its steps: harmonica\)"),
        (
            MIXED,
            {"scheme": "W3A16"},
            r"their own scheme \(rtn W8A16, gptq W4A16\), so --scheme is ambiguous; .*--set rtn\.scheme",
        ),
        (MIXED, {"targets": ["*"]}, r"their own targets .*, so --targets is ambiguous"),
        (GPTQ, {"scheme": "W9A16"}, r"gptq: option 'scheme': unknown scheme 'W9A16'; expected"),
    ],
)
def test_what_cannot_be_adjusted_is_said_in_one_line(recipe: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message) as raised:
        Recipe.parse(recipe).adjusted(**change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["2024-13-45", "[" * 10_000, "steps: !!int x", "steps: !!bool x"])
def test_values_that_the_loader_trips_over_are_no_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(AerogelError, match=r"own\.yaml is not YAML: "):
        Recipe.parse(tmp_path / "own.yaml")
    with pytest.raises(AerogelError, match="gptq"):
        Recipe.parse("gptq-w4a16", [f"gptq.percdamp={text}"])
