"""Recipes: YAML in, checked steps out. A step's key is a method's file name, its values are the fields of that method's dataclass."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aerogel import catalog
from aerogel.errors import AerogelError, nearest
from aerogel.methods.base import BlockMethod, Method, RuntimePolicy
from aerogel.numerics.scheme import Scheme
from aerogel.options import Count, Guidance, Pixels, Seed, Tokens, checked, reason

AnyMethod = BlockMethod | Method | RuntimePolicy[Any]
Built = TypeVar("Built")


@dataclass(frozen=True)
class Step:
    """One method with its options."""

    name: str
    """File name of the method."""
    method: AnyMethod

    def has(self, option: str) -> bool:
        """Return True where the method has this option."""
        return option in {field.name for field in dataclasses.fields(self.method)}  # type: ignore[arg-type]

    def changed(self, option: str, change: Callable[[Any], Any]) -> Step:
        """Return the step with an option changed, where it has that; raises AerogelError for a value that cannot be."""
        if not self.has(option):
            return self
        return Step(self.name, dataclasses.replace(self.method, **{option: change(getattr(self.method, option))}))  # type: ignore[type-var]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The step as a recipe writes it, every option spelled out."""
        return {self.name: {field.name: plain(getattr(self.method, field.name)) for field in dataclasses.fields(self.method)}}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """Methods with their options, applied to a model one after the other."""

    name: str
    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, source: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe from a shipped name, a YAML file, a mapping, or another recipe; `overrides` are `method.option=value`.

        Raises AerogelError for an unknown recipe, method or option (with the nearest known one) and for a value of the wrong type.
        """
        if isinstance(source, Recipe) and not (overrides := list(overrides)):
            return source
        recipe, settings = cls.parse_run(source, overrides)
        if settings != RunSettings():
            warnings.warn(
                f"recipe {recipe.name!r} also has a model, data or an output, which only the command line reads; give them as arguments",
                stacklevel=2,
            )
        return recipe

    @classmethod
    def parse_run(cls, source: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> tuple[Recipe, RunSettings]:
        """Read a recipe and what its file says about a run: the model, the data and the output; raises AerogelError like `parse`."""
        document = _read(source)
        for override in overrides:
            _override(document, override)
        steps = tuple(_step(document.name, number, step) for number, step in enumerate(document.steps, 1))
        return cls(document.name, steps), RunSettings(**{key: getattr(document, key) for key in RunSettings.model_fields})

    def adjusted(self, scheme: str | None = None, targets: Iterable[str] = (), ignore: Iterable[str] = ()) -> Recipe:
        """Return the recipe with another scheme and other targets in all steps that have them, and more patterns to ignore in those.

        Raises AerogelError when no step has such an option, when the scheme is unknown, and when the recipe gives its steps different
        schemes or targets on purpose, so that one for all would undo it.
        """
        changed, targets, ignore = self, tuple(targets), tuple(ignore)
        if scheme is not None:
            self._require_same("scheme", [step for step in self.steps if step.method.quantizes])
            changed = changed._with("scheme", lambda before: scheme)
        if targets:
            self._require_same("targets", self.steps)
            changed = changed._with("targets", lambda before: targets)
        if ignore:
            changed = changed._with("ignore", lambda before: tuple(dict.fromkeys((*before, *ignore))))
        return changed

    def _with(self, option: str, change: Callable[[Any], Any]) -> Recipe:
        """The recipe with an option changed in every step that has it."""
        if not any(step.has(option) for step in self.steps):
            names = ", ".join(step.name for step in self.steps)
            raise AerogelError(f"recipe {self.name!r} has no step with the option {option} (its steps: {names}); leave --{option} out")
        return dataclasses.replace(self, steps=tuple(step.changed(option, change) for step in self.steps))

    def _require_same(self, option: str, steps: Sequence[Step]) -> None:
        """Raise AerogelError where the steps have different values of an option, which one for all would undo."""
        found = {step.name: plain(getattr(step.method, option)) for step in steps if step.has(option)}
        if any(value != next(iter(found.values())) for value in found.values()):
            each = ", ".join(f"{name} {value}" for name, value in found.items())
            raise AerogelError(
                f"the steps of recipe {self.name!r} have their own {option} ({each}), so --{option} is ambiguous; "
                f"set the one that is meant: --set {next(iter(found))}.{option}=..."
            )

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every option spelled out; `Recipe.parse` reads it back to an equal recipe."""
        return {"name": self.name, "steps": [step.as_dict() for step in self.steps]}


class _Settings(BaseModel):
    """Settings in a recipe file; another key is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(_Settings):
    """The model of a run."""

    name: str
    """A folder, a hub id (owner/name) or a reference model."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype to compute in."""


class DataSettings(_Settings):
    """The calibration data of a run; what is not given has the default of the command line."""

    source: str | None = None
    """Shipped text by name, a file, a folder or a dataset of the hub; for diffusion models a file with one prompt per line, or records."""
    column: str | None = None
    """Column of the records; None finds it by its name."""
    prompts: list[str] | None = None
    """Prompts of a diffusion model, instead of a file with them."""
    samples: Count | None = None
    """Sequences, or images."""
    length: Tokens | None = None
    """Tokens of a sequence."""
    steps: Count | None = None
    """Sampling steps of a diffusion model."""
    guidance: Guidance | None = None
    """Guidance scale of a diffusion model."""
    height: Pixels | None = None
    """Pixels of what a diffusion model makes."""
    width: Pixels | None = None
    """Pixels of what a diffusion model makes."""
    num_frames: Count | None = None
    """Frames of what a video model makes."""
    batch_size: Count | None = None
    """Sequences, chats or images in one call."""
    seed: Seed | None = None
    """Seed of the run."""


class RunSettings(_Settings):
    """The parts of a recipe file that make it the description of a whole run; none of them needs to be there."""

    model: ModelSettings | None = None
    data: DataSettings = DataSettings()
    output: str | None = None
    """The folder to write."""


class _Document(RunSettings):
    """Content of a recipe file, before methods are looked up."""

    name: str
    steps: Annotated[list[dict[str, dict[str, Any] | None]], Field(min_length=1)]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _read(source: Recipe | str | Path | Mapping[str, Any]) -> _Document:
    if isinstance(source, Recipe):
        return _document(source.as_dict(), f"recipe {source.name!r}")
    if isinstance(source, Mapping):
        return _document({"name": "custom", **source}, "recipe")
    path = _path_of(source)
    try:
        content = _yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise AerogelError(f"recipe {path} is not YAML: {_one_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AerogelError(f"recipe {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise AerogelError(f"recipe {path} must be a mapping with the keys name and steps")
    return _document({"name": path.stem, **content}, f"recipe {path}")


def _path_of(source: str | Path) -> Path:
    path = Path(source)
    if isinstance(source, str) and source in catalog.names("recipes"):
        return catalog.card("recipes", source).path
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise AerogelError(f"recipe file {path} does not exist")
    return catalog.card("recipes", str(source)).path


def _yaml(text: str) -> Any:
    """Return what YAML text holds; raises yaml.YAMLError also where the loader trips over it, as over the date 2024-13-45."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise yaml.YAMLError(f"{error}" or type(error).__name__) from error


def _document(content: Mapping[str, Any], where: str) -> _Document:
    content = dict(content)
    _require_known(content, _Document, where)
    if isinstance(content.get("model"), str):
        content["model"] = {"name": content["model"]}
    for key, kind in (("model", ModelSettings), ("data", DataSettings)):
        if isinstance(content.get(key), Mapping):
            _require_known(content[key], kind, f"{where}, {key}")
    try:
        return _Document.model_validate(content)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise AerogelError(f"{where}: {reason(error)}{_EXPECTED.get(wrong, '')}") from error


_EXPECTED = {
    "steps": "; expected `steps` to be a list of `- method: {option: value}`",
    "model": "; expected `model` to be a name or {name, revision, dtype}",
    "data": f"; expected `data` to be a mapping of {', '.join(DataSettings.model_fields)}",
}


def _require_known(content: Mapping[Any, Any], kind: type[BaseModel], where: str) -> None:
    for key in content:
        if key not in kind.model_fields:
            raise AerogelError(f"{where}: unknown key {key!r}{nearest(str(key), kind.model_fields)}")


def _override(document: _Document, override: str) -> None:
    """Set one option of every step of that method."""
    name, option, value = parse_override(override, "method.option=value, for example gptq.scheme=W3A16")
    steps = [step for step in document.steps if name in step]
    if not steps:
        raise AerogelError(f"override {override!r}: recipe {document.name!r} has no step {name!r}{_nearest_step(document, name)}")
    for step in steps:
        step[name] = {**(step[name] or {}), option: value}


def parse_override(override: str, expected: str) -> tuple[str, str, Any]:
    """Return (name, option, value) of `name.option=value`, the value read as YAML; raises AerogelError that says what is expected."""
    target, equals, text = override.partition("=")
    name, dot, option = target.strip().partition(".")
    if not (equals and dot and option):
        raise AerogelError(f"cannot read override {override!r}; expected {expected}")
    try:
        return name, option, _yaml(text)
    except yaml.YAMLError as error:
        raise AerogelError(f"override {override!r}: the value is not YAML: {_one_line(error)}") from error


def options_of(overrides: Iterable[str], expected: str) -> dict[str, dict[str, Any]]:
    """Return {name: {option: value}} of many `name.option=value`; raises AerogelError like parse_override."""
    options: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, option, value = parse_override(override, expected)
        options.setdefault(name, {})[option] = value
    return options


def _nearest_step(document: _Document, name: str) -> str:
    return nearest(name, {key for step in document.steps for key in step})


def _step(recipe: str, number: int, step: Mapping[str, Mapping[str, Any] | None]) -> Step:
    if len(step) != 1:
        raise AerogelError(f"recipe {recipe!r}, step {number}: a step has one key, the method; got {sorted(step)}")
    ((name, options),) = step.items()
    where = f"recipe {recipe!r}, step {number} ({name})"
    if name not in catalog.names("methods"):
        raise AerogelError(f"recipe {recipe!r}, step {number}: unknown method {name!r}{nearest(name, catalog.names('methods'))}")
    return Step(name, build(catalog.find("methods", name), options or {}, where))


def build(cls: type[Built], options: Mapping[str, Any], where: str) -> Built:
    """Make a dataclass of options from their values; raises AerogelError for an unknown option (with the nearest) or a wrong value."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise AerogelError(f"{where}: unknown option {option!r}{nearest(str(option), fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in options and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise AerogelError(f"{where}: {', '.join(missing)} must be given")
    values = {option: checked(cls, option, value, f"{where}: option {option!r}") for option, value in options.items()}
    try:
        return cls(**values)
    except AerogelError as error:
        raise AerogelError(f"{where}: {error}") from error


def plain(value: Any) -> Any:
    """An option's value as YAML and JSON write it."""
    if isinstance(value, Scheme | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(plain(inner) for inner in value)
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
