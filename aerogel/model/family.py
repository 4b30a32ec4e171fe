"""Architecture families: the names of a model's parts, as data that methods and the walk read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from aerogel.errors import AerogelError

Modality = Literal["text", "image-text", "image", "video"]


@dataclass(frozen=True)
class TimePath:
    """Path of a denoiser's time step to its blocks: an embedder, then linear layers that read the embedder's activated output.

    What the projections give are the temporal features; no image enters before them.
    """

    embedders: tuple[str, ...]
    """Globs of the modules that embed the sinusoid of a step; several are copies that see the same sinusoid."""
    projections: tuple[str, ...]
    """Globs of the linear layers that project the embedding for the blocks."""
    others: tuple[tuple[str, str], ...] = ()
    """(setting of the config, what else enters before the projections where the setting is given)."""
    always: tuple[str, ...] = ()
    """Other inputs that enter before the projections whatever the config says."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the path's layers."""
        return (*(f"{glob}.*" for glob in self.embedders), *self.projections)


@dataclass(frozen=True)
class CachedModule:
    """A part of a denoiser's blocks whose output can be kept for later steps: it is added to the stream, through a gate if there is one."""

    glob: str
    """Glob of their full names."""
    kind: Literal["self-attention", "cross-attention", "feed-forward", "block"]
    """Attention of text and image together is self-attention; `block` is attention and feed-forward that one linear joins."""
    norms: tuple[str, ...] = ()
    """Norms that only the cached module reads, by name beside it: they need not run where it does not; two modules may share one.
    Only operations that work token by token may stand between the two, since they get no tokens then."""
    parts: tuple[str, ...] = ()
    """Modules beside it that work for nothing but the module and count as its own work; they run no more than it does."""


@dataclass(frozen=True)
class Skips:
    """The skip connections of a denoiser that goes down and up again."""

    given: tuple[str, ...]
    """Globs of the blocks whose input is also handed across: one skip each, the outermost runs first."""
    read: tuple[str, ...]
    """Globs of the blocks that read a skip each beside what the block before gives; the outermost runs last."""


@dataclass(frozen=True)
class Family:
    """One architecture family."""

    name: str
    matches: tuple[str, ...]
    """Values of `config.model_type`, or diffusers class names, that belong to the family."""
    never_quantize: tuple[str, ...] = ()
    """Globs of linear layers that no method quantizes unless asked by name, such as router gates."""
    time: TimePath | None = None
    cached_modules: tuple[CachedModule, ...] = ()
    """Of a denoiser, in the order in which a block runs them."""
    hidden_state_args: tuple[str, ...] = ()
    """Of a denoiser whose blocks are one row: the arguments that hold what blocks pass on, in the order in which they give it."""
    image_stream: str = "hidden_states"
    """The one of these arguments that holds the image."""
    skips: Skips | None = None
    """Of a denoiser that goes down and up again."""
    pattern_sets: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Patterns that a recipe may name in `targets` and `ignore` as `@name`, such as what published code leaves unquantized."""
    modality: Modality = "text"

    def expand_patterns(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return patterns with the family's own lists (`@name`) written out; `@time_path` is the temporal path.

        Raises AerogelError for a list that the family does not have.
        """
        found: list[str] = []
        for pattern in patterns:
            if not pattern.startswith("@"):
                found.append(pattern)
            elif (known := self._pattern_sets()).get(pattern[1:]) is not None:
                found += known[pattern[1:]]
            else:
                names = ", ".join(f"@{name}" for name in known) or "none"
                raise AerogelError(f"the {self.name} family has no list {pattern}; it has {names}")
        return tuple(found)

    def _pattern_sets(self) -> dict[str, tuple[str, ...]]:
        time = {} if self.time is None else {"time_path": self.time.patterns}
        return time | dict(self.pattern_sets)
