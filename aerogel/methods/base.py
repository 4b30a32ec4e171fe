"""What a method is: a frozen dataclass of options with exactly one verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.numerics.scheme import Scheme


def name_of(method: object) -> str:
    """Return the name that recipes call a method by: that of its file."""
    return type(method).__module__.rpartition(".")[2]


class BlockMethod(ABC):
    """Changes one block for good, seeing that block and its calls only."""

    needs: ClassVar[frozenset[str]] = frozenset({"calls"})
    """What the method reads: calls, edges, gradients, and the teacher (what the untouched network gives)."""
    forwards: ClassVar[float] = 2.0
    """About how many forwards of a block over its calls one visit takes, the one that propagates included; for the estimate of time."""

    @property
    def fitted(self) -> int:
        """Samples that an optimiser sees in each block, all of its steps together; for the estimate of time."""
        return 0

    @property
    def holds(self) -> float:
        """Bytes of activations it may hold at once beyond those of one call; for the estimate of memory."""
        return 0.0

    @abstractmethod
    def compress(self, block: Block) -> None:
        """Change the block's weights or modules in place."""


class Method(ABC):
    """Changes a whole network for good."""

    needs: ClassVar[frozenset[str]] = frozenset()
    beside_reuse: ClassVar[bool] = False
    """Whether it may come behind a step that lets parts of the network rest."""

    def stores(self, network: Network) -> dict[str, tuple[Any, Scheme]]:
        """The float layers that it puts into codes: full name -> (layer, scheme); for the plan."""
        return {}

    @abstractmethod
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Change the network in place."""


class RuntimePolicy(ABC):
    """Acts while the network runs: measured once, then put on and taken off."""

    needs: ClassVar[frozenset[str]] = frozenset({"calls"})
    by_step: ClassVar[bool] = False
    """Whether all it does is let modules answer out of tables by the step (model/lookup.py), which a static graph can say."""

    def passed(self, steps: int, at_once: int, sample: int, tokens: int) -> float:
        """Positions that pass the network beyond those recorded, for the estimate of time; none unless a policy says so.

        A generation takes so many steps, the largest call has `at_once` positions, an image `sample`, all calls `tokens`.
        """
        return 0.0

    @abstractmethod
    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Measure what the policy needs: small tensors and numbers."""

    def step_sizes(self, state: Mapping[str, Any], block: str) -> tuple[str, ...]:
        """The step sizes in the state that act inside a block, by key: block methods may learn them; none unless a policy says so."""
        return ()

    @abstractmethod
    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[None]:
        """Put the policy on; after the context the network is bit for bit what it was."""


@dataclass(frozen=True)
class WeightMethod(BlockMethod):
    """A block method that gives linears, and convolutions where it can, a scheme."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """The kinds of layers it can quantize."""

    scheme: Scheme | str = "W4A16"
    """Preset name of the number format and granularity, for example W4A16_G64."""
    targets: tuple[str, ...] = ("Linear",)
    """Which linears: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Which of them to leave alone; wins over targets."""
    overrides: Mapping[str, Scheme | str] = field(default_factory=dict)
    """Other schemes for some linears, by pattern; the first match wins."""

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of the linear with this full dotted name."""
        for pattern, scheme in self.overrides.items():
            if matches(name, (pattern,)):
                return Scheme.parse(scheme)
        return Scheme.parse(self.scheme)

    def assign(self, block: Block) -> dict[str, tuple[Any, Scheme]]:
        """The block's float layers that this method quantizes: name relative to the block -> (layer, scheme)."""
        return {
            name: (layer, self.scheme_of(block.full_name(name)))
            for name, layer in block.linears(self.targets, self.ignore).items()
            if isinstance(layer, self.layers)
        }
