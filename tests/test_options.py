"""Every option of every method, measure and exporter refuses nonsense in one line when it is read, and `plan` takes its extremes."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from aerogel import catalog
from aerogel.engine.planning import plan
from aerogel.errors import reasons
from aerogel.options import _bound, _hints
from aerogel.recipe import build
from tests import image_pipelines
from tests.folders import model_folder

CLASSES = [(kind, name) for kind in ("methods", "measures", "exporters") for name in catalog.names(kind)]
SIGNED = {
    *("late", "front", "low", "high", "weight_first", "weight_last"),  # weights
    *("window", "unconditional_window", "low_window", "high_window", "pab.first", "pab.last"),  # edges of windows of time steps
}
"""Options that may be below zero."""
UNBOUNDED = {"max_shard_size", "seed", "budget_bytes"}
"""Options that may be a million million."""


def hints(kind: str, name: str) -> Mapping[str, Any]:
    cls = catalog.find(kind, name)
    return _hints(cls) if dataclasses.is_dataclass(cls) else {}


def parts(hint: Any) -> Iterator[Any]:
    """The plain types inside a type."""
    inner = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ()
    yield from (part for arg in inner for part in parts(arg)) if inner else iter([hint])


def refusals(kind: str, name: str, option: str, value: Any) -> list[str]:
    """What is said against a value of an option; raises whatever is no AerogelError."""
    return list(reasons(lambda: build(catalog.find(kind, name), {option: value}, name)))


def nonsense(name: str, option: str, types: set[Any]) -> Iterator[Any]:
    """Values that an option of numbers has to refuse."""
    yield from (math.nan, math.inf, -math.inf, 10**400, "1", "", None if type(None) not in types else "none", [[]])
    if option not in SIGNED and f"{name}.{option}" not in SIGNED:
        yield -1
    if int in types and option not in UNBOUNDED:
        yield 10**12


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_nonsense_is_refused(kind: str, name: str) -> None:
    for option, hint in hints(kind, name).items():
        types = set(parts(hint))
        for value in nonsense(name, option, types) if types & {int, float} else ():
            (said,) = refusals(kind, name, option, value) or [""]
            assert said.startswith(f"{name}: option '{option}': "), (option, value, said)
            assert "\n" not in said


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_values_of_other_kinds_end_in_one_line(kind: str, name: str) -> None:
    for option in hints(kind, name):
        for value in ({"x": 1}, [[]], object(), b"x", {1, 2}, 1j, "", [""], {"": ""}, True):
            said = refusals(kind, name, option, value)
            assert not any("\n" in line for line in said), (option, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    image_pipelines.classes().save_pretrained(folder / "dit")
    return [*(model_folder(folder / name, name, num_hidden_layers=1) for name in ("llama", "mixtral")), folder / "dit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names("methods"))
def test_plan_takes_the_largest_numbers(name: str, models: list[Path]) -> None:
    for option, hint in hints("methods", name).items():
        value: Any = _bound(hint, "le") if {int, float} & set(parts(hint)) else None
        for model in models if value is not None else ():
            value = int(value) if int in set(parts(hint)) else value
            list(reasons(lambda model=model, option=option, value=value: plan(model, {"name": "x", "steps": [{name: {option: value}}]})))
