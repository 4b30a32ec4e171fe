"""Finds methods, families, exporters, measures and recipes by name: the folders are the lists, and nothing is imported to list them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from aerogel.errors import AerogelError, nearest

PLUGINS = "aerogel.plugins"
"""Entry-point group of third parties: each value names an importable package that has folders like aerogel's own."""


class _Kind(NamedTuple):
    folder: str
    shared: tuple[str, ...] = ()
    """The files of the folder that hold what its files have in common."""
    defines: str = "class"
    """Content of a file: a class (the public one, or the one called like the file), the constant of this name, or (a suffix) itself."""


_KINDS = {
    "methods": _Kind("methods", ("base.py", "policy.py")),
    "families": _Kind("families", defines="FAMILY"),
    "exporters": _Kind("export", ("exporter.py",)),
    "measures": _Kind("evaluate", ("measure.py", "features.py", "inception.py", "reference.py", "timing.py")),
    "recipes": _Kind("recipes", defines=".yaml"),
}
KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class Card:
    """Entry of a name: one file of one folder."""

    kind: str
    name: str
    path: Path
    module: str
    """Dotted name of the file's module; empty for a recipe."""
    member: str
    """The class or constant that the file is there for; empty for a recipe."""
    summary: str
    """First line of the member's docstring, else of the file's; for a recipe its first comment."""


class Option(NamedTuple):
    """One field of a method: what a recipe may set."""

    name: str
    type: str
    default: Any
    """`dataclasses.MISSING` where the recipe must give a value."""
    doc: str


def names(kind: str) -> list[str]:
    """The names of one kind in alphabetical order; raises AerogelError when there is no such kind."""
    return sorted(_cards(kind))


def card(kind: str, name: str) -> Card:
    """The card of a name; raises AerogelError with the nearest names when there is none."""
    cards = _cards(kind)
    if name not in cards:
        raise AerogelError(f"unknown {_singular(kind)} {name!r}{nearest(name, cards)}")
    return cards[name]


def find(kind: str, name: str) -> Any:
    """Import what a name stands for: the file's public class, or its FAMILY; raises AerogelError when the name is unknown."""
    found = card(kind, name)
    if not found.module:
        raise AerogelError(f"{_singular(kind)} {name!r} is a file to read, not code to import: {found.path}")
    return getattr(importlib.import_module(found.module), found.member)


def options(cls: Any) -> list[Option]:
    """The fields of a dataclass with the docstring under each, inherited ones included."""
    docs: dict[str, str] = {}
    annotations: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for name, annotation, doc in _documented_fields(base):
                docs[name] = doc or docs.get(name, "")
                annotations[name] = annotation
    return [Option(field.name, annotations[field.name], _default(field), docs[field.name]) for field in dataclasses.fields(cls)]


def _singular(kind: str) -> str:
    return {"families": "family"}.get(kind, kind.removesuffix("s"))


def clear_cache() -> None:
    """Forget what was found, so that the folders and entry points are read again."""
    _cards.cache_clear()
    _packages.cache_clear()


@cache
def _cards(kind: str) -> dict[str, Card]:
    if kind not in _KINDS:
        raise AerogelError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    cards: dict[str, Card] = {}
    for package, root in _packages():
        for found in _read_folder(kind, package, root):
            if found.name in cards:
                raise AerogelError(f"two {kind} are called {found.name!r}: {cards[found.name].path} and {found.path}; rename one")
            cards[found.name] = found
    return cards


@cache
def _packages() -> Sequence[tuple[str, Path]]:
    """Aerogel's own package and those of third parties, as (dotted name, folder), found without importing them."""
    packages = ["aerogel", *sorted(entry.value for entry in importlib.metadata.entry_points(group=PLUGINS))]
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise AerogelError(f"plugin {package!r} of entry-point group {PLUGINS} is no importable package; reinstall or remove it")
        found.append((package, Path(spec.submodule_search_locations[0])))
    return found


def _read_folder(kind: str, package: str, root: Path) -> Iterator[Card]:
    folder, shared, defines = _KINDS[kind]
    suffix = defines if defines.startswith(".") else ".py"
    for path in sorted((root / folder).rglob(f"*{suffix}")):
        if path.name.startswith("_") or path.name in shared:
            continue
        if suffix == ".yaml":
            yield Card(kind, path.stem, path, "", "", _first_comment(path))
            continue
        module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
        found = _read_module(kind, path, module, defines)
        if found is not None:
            yield found


def _read_module(kind: str, path: Path, module: str, defines: str) -> Card | None:
    """Return the card of a Python file, or None when the file defines nothing of its kind."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if defines == "class":
        public = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        # Where a file has helpers that its tests name, the class called like the file is meant.
        public = [node for node in public if node.name.lower() == path.stem.replace("_", "")] or public
        if len(public) > 1:
            raise AerogelError(f"{path} has {len(public)} public classes and none is called like the file; keep one, or rename it")
        if not public:
            return None
        doc = ast.get_docstring(public[0]) or ast.get_docstring(tree) or ""
        return Card(kind, path.stem, path, module, public[0].name, doc.partition("\n")[0])
    if defines not in {name for node in tree.body for name in _assigned(node)}:
        return None
    return Card(kind, path.stem, path, module, defines, (ast.get_docstring(tree) or "").partition("\n")[0])


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _documented_fields(cls: Any) -> Iterator[tuple[str, str, str]]:
    """(name, annotation, docstring) of each field that a class itself declares."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    unbounded = _Unbounded(vars(sys.modules[cls.__module__]))
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield node.target.id, ast.unparse(unbounded.visit(node.annotation)), inspect.cleandoc(str(doc))


class _Unbounded(ast.NodeTransformer):
    """Writes the plain type for one that declares bounds, by name or in place."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        named = self._names.get(node.id)
        return ast.Name(get_args(named)[0].__name__) if get_origin(named) is Annotated else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return self.generic_visit(node)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
