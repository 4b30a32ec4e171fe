"""The catalog: folders are lists, names lead to files, nothing is imported on the way."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import aerogel
from aerogel import catalog
from aerogel.errors import AerogelError, nearest

PACKAGE = Path(catalog.__file__).parent


def test_the_face_is_exactly_what_is_intended() -> None:
    intended = [
        "AerogelError",
        "Plan",
        "Recipe",
        "Result",
        "__version__",
        "cached",
        "compress",
        "load",
        "measure",
        "plan",
        "register_diffusers",
        "register_transformers",
        "skipping",
    ]
    assert sorted(aerogel.__all__) == intended == dir(aerogel)
    assert all(callable(getattr(aerogel, name)) for name in intended if name != "__version__")
    with pytest.raises(AttributeError, match="comprss"):
        aerogel.comprss  # noqa: B018


def test_import_and_listing_load_nothing_heavy() -> None:
    code = (
        "import sys, aerogel, aerogel.cli.commands\n"
        "from aerogel import catalog\n"
        "for kind in catalog.KINDS: catalog.names(kind)\n"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_every_card_is_complete_and_every_name_is_found(kind: str) -> None:
    names = catalog.names(kind)
    assert names == sorted(names)
    assert names
    for name in names:
        card = catalog.card(kind, name)
        assert card.path.is_file()
        assert card.summary, f"{card.path} does not say what it is"
        if card.module:
            assert catalog.find(kind, name) is not None


def test_lists_are_the_files_of_the_folders() -> None:
    files = {path.stem for path in (PACKAGE / "families").glob("*.py")} - {"__init__"}
    assert set(catalog.names("families")) == files
    assert set(catalog.names("recipes")) == {path.stem for path in (PACKAGE / "recipes").glob("*.yaml")}
    assert "method" not in catalog.names("methods")
    assert "measure" not in catalog.names("measures")


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(AerogelError, match=r"unknown method 'gpqt'; did you mean gptq"):
        catalog.find("methods", "gpqt")
    with pytest.raises(AerogelError, match="unknown family 'flax'; did you mean flux"):
        catalog.card("families", "flax")
    with pytest.raises(AerogelError, match=r"unknown kind 'method'; expected one of methods, "):
        catalog.names("method")
    with pytest.raises(AerogelError, match="recipe 'rtn-w4a16' is a file to read"):
        catalog.find("recipes", "rtn-w4a16")


def test_nearest_lists_everything_when_nothing_is_close() -> None:
    assert nearest("zzz", ["b", "a"]) == "; known are a, b"
    assert nearest("zzz", []) == "; there are none"


def test_third_parties_bring_methods_and_recipes(plugin: Path) -> None:
    (plugin / "methods" / "shrink.py").write_text('"""Shrinks."""\n\nclass Helper:\n    pass\n\nclass Shrink:\n    """Shrinks things."""\n')
    (plugin / "recipes" / "tiny.yaml").write_text("# Shrinks all\nsteps: [{shrink: {}}]\n")
    assert {"shrink", "gptq"} <= set(catalog.names("methods"))
    assert catalog.card("methods", "shrink").summary == "Shrinks things."
    assert "thirdparty.methods.shrink" not in sys.modules
    assert catalog.find("methods", "shrink").__name__ == "Shrink"
    assert catalog.card("recipes", "tiny").summary == "Shrinks all"


def test_two_files_of_one_name_are_an_error(plugin: Path) -> None:
    (plugin / "methods" / "gptq.py").write_text("class Gptq:\n    pass\n")
    with pytest.raises(AerogelError, match="two methods are called 'gptq'"):
        catalog.names("methods")


def test_a_file_that_says_not_which_class_is_meant_is_an_error(plugin: Path) -> None:
    (plugin / "methods" / "two.py").write_text("class A:\n    pass\n\nclass B:\n    pass\n")
    with pytest.raises(AerogelError, match=r"two\.py has 2 public classes"):
        catalog.names("methods")


def test_a_plugin_that_cannot_be_imported_is_an_error(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("gone", "no_such_package", catalog.PLUGINS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with pytest.raises(AerogelError, match="plugin 'no_such_package'"):
        catalog.names("methods")


@dataclass
class _Base:
    first: int
    """The first."""
    second: float = 0.5
    """The second."""


@dataclass
class _Derived(_Base):
    second: float = 0.25
    third: tuple[str, ...] = dataclasses.field(default_factory=tuple)
    """The third,
    on two lines."""


def test_options_carry_their_docstrings_over_inheritance() -> None:
    assert catalog.options(_Derived) == [
        ("first", "int", dataclasses.MISSING, "The first."),
        ("second", "float", 0.25, "The second."),
        ("third", "tuple[str, ...]", (), "The third,\non two lines."),
    ]
