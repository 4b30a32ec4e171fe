"""What a method is: a frozen dataclass of knobs with exactly one verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.reuse.schedule import Schedule, reusing
from aerogel.model.reuse.spans import Rule, spanning
from aerogel.model.reuse.stored import Slots, store_named
from aerogel.model.skipping.kinds import Vocabulary
from aerogel.model.skipping.routing import Rule as SkipRule
from aerogel.model.skipping.routing import Shape, Skipping, shape_of, skipping
from aerogel.numerics.scheme import Scheme
from aerogel.training.answers import Answers
from aerogel.training.budgets import Budget, Measure, budget_of

Strengths = tuple[str, tuple[float, ...]]
"""A knob, and values of it in order of what they save, the least first."""


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

        A generation takes so many steps, the largest call has `at_once` positions, a picture `sample`, all calls `tokens`.
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
class ReusePolicy(RuntimePolicy):
    """Lets units of a denoiser give again what they gave at earlier steps, by a schedule that is its state."""

    strengths: ClassVar[Strengths | None] = None
    """What sets how much is reused, for who looks for a speed; None where nothing does."""
    rounds: ClassVar[bool] = True
    """Whether what it keeps may be rounded to float8; not where a policy puts itself on in its own way, unless that says so."""

    slots: Slots = field(default="compute", kw_only=True)
    """How kept tensors are stored: in the dtype they are computed in, or as float8 (e4m3) with one scale a token."""

    @property
    def plain(self) -> bool:
        """Whether it gives outputs again by its schedule and does nothing else: it puts itself on as this class does."""
        return type(self).on is ReusePolicy.on

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "on" in vars(cls) and "rounds" not in vars(cls):
            cls.rounds = False

    def __post_init__(self) -> None:
        store_named(self.slots)
        if self.slots != "compute" and not self.rounds:
            name = type(self).__name__.lower()
            raise AerogelError(f"{name} needs what it keeps as it was computed: set slots to compute, not {self.slots}")

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Reuse by the schedule; raises AerogelError when it is of other units, and at steps that are not its own."""
        return reusing(network, Schedule.of(network, state), store=self.slots)


class RevisingPolicy(ReusePolicy):
    """Goes on from the schedule of the policy before it, which it takes the place of."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Refuse: by itself it has nothing to go on from."""
        raise AerogelError(f"{type(self).__name__.lower()} goes on from a schedule: put a policy that reuses by one before it")

    @abstractmethod
    def revise(self, network: Network, calls: Sequence[Call], before: dict[str, Any]) -> dict[str, Any]:
        """Return the state that takes the place of the one before; that policy is off meanwhile."""


class SpanPolicy(ReusePolicy):
    """Leaves out stretches of a denoiser's blocks by a rule, and adds what they added before."""

    rounds: ClassVar[bool] = True

    @abstractmethod
    def rule(self, state: dict[str, Any]) -> Rule:
        """A new rule, for one guidance stream of one run."""

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Leave out blocks by the rule; raises AerogelError when the state is of another network, and at steps that are not its own."""
        return spanning(network, state, partial(self.rule, state), self.slots)


@dataclass(frozen=True)
class BudgetPolicy(ReusePolicy):
    """Reuses until an exact budget is met, so that the network stays close to what it was before any step of the recipe."""

    needs: ClassVar[frozenset[str]] = frozenset({"calls", "teacher"})

    ratio: float | None = None
    """Share of slots (steps x units) to reuse; this or `target_speedup`."""
    target_speedup: float | None = None
    """How many times faster the denoiser has to be."""
    by: Measure = "latency"
    """What a target speed-up is counted in: measured seconds of the units, or their multiply-accumulates."""

    def budget(self, network: Network, calls: Sequence[Call]) -> Budget:
        """What has to be saved; raises AerogelError when that is not said, said twice or cannot be had."""
        return budget_of(network, calls, self.ratio, self.target_speedup, self.by)


@dataclass(frozen=True)
class SkipPolicy(RuntimePolicy):
    """Lets tokens of a mixture do without some of the experts they were routed to; what is dropped is not computed."""

    attends: ClassVar[bool] = False
    """Whether its rule asks what attention each token received."""

    renormalise: bool = field(default=False, kw_only=True)
    """Whether the weights of the experts that are left are raised to what all weighed together."""
    keep_top1: bool = field(default=False, kw_only=True)
    """Whether a token keeps its best expert whatever the rule says."""
    protect_special: bool = field(default=True, kw_only=True)
    """Whether marks of a chat keep all experts; they count in the ratio all the same."""

    def passed(self, steps: int, at_once: int, sample: int, tokens: int) -> float:
        """Once whole, once to look at scores, a bisection of a hundred thresholds, and once for what it says in the end."""
        return 10.0 * tokens

    @abstractmethod
    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Measure what the rule needs."""

    @abstractmethod
    def rule(self, state: Mapping[str, Any]) -> SkipRule:
        """The rule that a state stands for."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Fit the rule on the calls and say what it costs there; raises AerogelError without routed experts."""
        shape_of(network)
        return self.calibrated_on(Answers(network, calls, Vocabulary.of(network)))

    def calibrated_on(self, answers: Answers) -> dict[str, Any]:
        """The same where the whole network's predictions are there already."""
        shape, vocabulary = shape_of(answers.network), answers.vocabulary
        state = {**vars(shape), "vision": list(vocabulary.vision), "special": list(vocabulary.special)}
        state |= self.fitted(answers, shape)
        error, ratio = answers.judge(self.skip(state, vocabulary), self.attends)
        return state | {"kl": error, "skipped": ratio, "answer_tokens": answers.tokens}

    def skip(self, state: Mapping[str, Any], vocabulary: Vocabulary) -> Skipping:
        """The rule of a state with this policy's switches."""
        return Skipping(self.rule(state), vocabulary, self.renormalise, self.keep_top1, self.protect_special)

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Skip by the rule; raises AerogelError when the state is of a network with other layers or experts."""
        ours, theirs = shape_of(network), Shape(*(state[key.name] for key in fields(Shape)))
        if ours != theirs:
            raise AerogelError(
                f"{type(self).__name__.lower()} was calibrated for {theirs.layers} layers of {theirs.experts} experts, {theirs.top_k} a "
                "token; "
                f"this network has {ours.layers} of {ours.experts}, {ours.top_k} a token: calibrate it anew"
            )
        vocabulary = Vocabulary(tuple(state["vision"]), tuple(state["special"]))
        return skipping(network, self.skip(state, vocabulary), self.attends)


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
