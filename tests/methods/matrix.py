"""What the contract matrix asks of every method on every tiny network, read off what the method declares.

Nothing here says which method suits which family: the plan does, and `LACKING` says of each requirement how a network shows it.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from aerogel import catalog
from aerogel.engine.calibration import reading
from aerogel.engine.opening import open_model
from aerogel.engine.planning import Plan, plan
from aerogel.engine.requirements import unmet_by_calls
from aerogel.methods.base import Before, Method, RuntimePolicy
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.kv_cache import with_cache
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.structure.moe import routed_experts
from aerogel.numerics.scheme import Scheme
from aerogel.recipe import Recipe, Step
from tests.runtime.feature_cache.test_replay import clips, dit_pipeline, packed, recorded
from tests.tiny import FAMILIES

METHODS = catalog.names("methods")

EIGHT_BITS = {"scheme": "W8A16_G16"}
"""Groups that divide every width of the tiny networks."""

OPTIONS: dict[str, dict[str, Any]] = {
    "brecq": {"targets": ["Linear"], "steps": 2, "batch": 4},
    "awq": {"search_space": 2},
    "reconstruct": {"steps": 2, "batch": 2},
    "fcpts": {"steps": 4, "batch": 1},
    "tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 20},
    "activation_ranges": {"start": "minmax", "steps": 0},
    "recalibrate": {"ranges": "minmax"},
    # Two experts a token: half of the pairs can go before a token has none.
    **{name: {"ratio": 0.2} for name in ("single_threshold", "naee", "odp", "diep")},
    "modes": {"ratio": 0.2, "points": 5},
    "reduced_topk": {"k": 1},
    "fastercache": {"conditional": "second"},
    # Changes of random networks from step to step are large.
    "teacache": {"degree": 1},
    "first_block": {"threshold": 1.0},
    "magcache": {"threshold": 0.2},
    "smoothcache": {"alpha": 0.25},
    # What learns from whole generations: few of them.
    "harmonica": {"ratio": 0.3, "trajectories": 2, "refresh": 1},
    "l2c": {"ratio": 0.3, "iterations": 4, "check": 4},
    "schedule_search": {"ratio": 0.3, "trials": 4, "samples": 2},
    "schedule_refine": {"trials": 4, "samples": 2},
}
"""Options that fit networks of width 64 and take a moment; a method's own test may give others as MATRIX = {"options": ...}."""

FIRST: dict[str, tuple[str, ...]] = {
    "fsc": ("tiar",),
    "activation_ranges": ("rtn",),
    "recalibrate": ("rtn", "activation_ranges"),
    **dict.fromkeys(("reconstruct", "bias_correction", "weight_correction"), ("magnitude",)),
}
"""Steps whose layers a method goes on from; which policy another takes the place of, it says itself."""

OWN: dict[str, dict[str, Any]] = {
    path.stem.removeprefix("test_"): runpy.run_path(str(path)).get("MATRIX", {})
    for path in Path(__file__).parent.glob("*/test_*.py")
    if path.stem.removeprefix("test_") in METHODS and "\nMATRIX = " in path.read_text("utf-8")
}

Source = Literal["calls", "trajectory", "pipeline"]
"""Calls of noise of their own each; one smooth generation of a denoiser; a generation of a pipeline, with its sampler."""


def one_run(made: tuple[Network, list[Call]], runs: int = 2) -> tuple[Network, list[Call]]:
    """Leave of recorded generations the first."""
    network, calls = made
    return network, calls[: len(calls) // runs]


def of_classes() -> tuple[Network, list[Call]]:
    """A DiT pipeline, with both branches of guidance in one batch."""
    network = dit_pipeline()
    return network, recorded(network, count=2)


PIPELINES: dict[str, Callable[[], tuple[Network, list[Call]]]] = {
    "dit": of_classes,
    "wan": lambda: one_run(clips()),
    "flux": lambda: one_run(packed()),
}
"""Pipelines around a tiny denoiser, each with the calls of one generation."""


def step(method: str) -> dict[str, Any]:
    made = catalog.find("methods", method)
    common = EIGHT_BITS if "scheme" in made.__dataclass_fields__ else {}
    return {method: common | OPTIONS.get(method, {}) | OWN.get(method, {}).get("options", {})}


def made(method: str) -> Any:
    """The method with its options here."""
    return Recipe.parse({"steps": [step(method)]}).steps[0].method


@cache
def first(method: str) -> tuple[str, ...]:
    """The steps that come before a method: those of the table, or the policy that it says it goes on from."""
    if "schedule" not in made(method).requires:
        return FIRST.get(method, ())
    policies = (name for name in METHODS if isinstance(made(name), RuntimePolicy) and not made(name).requires & {"replays", "schedule"})
    return (next(name for name in policies if not made(method).refusal(made(name))),)


@cache
def first_alike(method: str) -> str:
    """The first method by name that requires the same, with as many steps before it."""
    return next(name for name in METHODS if made(name).requires == made(method).requires and first(name) == first(method))


def trajectory(name: str, steps: Sequence[int] = (500, 499, 498, 497)) -> list[Call]:
    """One generation: a sample that changes a little from step to step, twice in a batch with two conditions, as with guidance."""
    one, other = FAMILIES[name].calls(2)
    latent = next(iter(one.kwargs))
    condition = {key: both(value, other.kwargs[key]) for key, value in one.kwargs.items()}
    at = condition.pop("timestep")
    start, end = one.kwargs[latent][:1], other.kwargs[latent][:1]
    calls = []
    for place, time in enumerate(steps):
        angle = torch.tensor(0.05 * place)
        x = angle.cos() * start + angle.sin() * end
        time = torch.full((2,), time / (1000 if at.is_floating_point() else 1), dtype=at.dtype)
        calls.append(Call((), {**condition, latent: torch.cat([x, x]), "timestep": time}))
    return [Call((), {key: call.kwargs[key] for key in one.kwargs}) for call in calls]


def both(value: Any, other: Any) -> Any:
    """An input for two samples."""
    one_sample = isinstance(value, Tensor) and value.ndim > 2 and len(value) == 1
    return torch.cat([value, other]) if one_sample else value


@dataclass(frozen=True)
class Case:
    """A method on a family; made by `case`."""

    method: str
    family: str

    @property
    def recipe(self) -> dict[str, Any]:
        """The method by itself, or behind what it goes on from."""
        return {"name": f"{self.method}-alone", "steps": [step(name) for name in (*first(self.method), self.method)]}

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The same, read."""
        return Recipe.parse(self.recipe).steps

    @property
    def requires(self) -> frozenset[str]:
        """What all of its steps require."""
        return frozenset().union(*(step.method.requires for step in self.steps))

    @cached_property
    def source(self) -> Source:
        """Which network and which calls it takes."""
        if "replays" in self.requires and self.family in PIPELINES:
            return "pipeline"
        denoises = isinstance(example(self.family, "calls").network.module, diffusers.ModelMixin)
        return "trajectory" if denoises and self.requires & {"trajectories", "time_path", "replays"} else "calls"

    @property
    def example(self) -> Example:
        """The network that it is tried on, with calls."""
        return example(self.family, self.source)

    @cached_property
    def plan(self) -> Plan:
        """What the plan says of it."""
        return plan(self.example.network, self.recipe, samples=self.example.calls, flops_a_second=lambda: 1e9)

    @cached_property
    def problems(self) -> list[str]:
        """What speaks against it before any work."""
        return [*self.plan.problems, *unmet_by_calls(self.example.network, Recipe.parse(self.recipe), self.example.calls)]

    @cached_property
    def before(self) -> list[Before]:
        """The network as each step finds it, and as the last leaves it: the layers that are quantized, as plan and steps declare it."""
        network, size = self.example.network, reading(self.example.network, self.example.calls)
        found = [Before(size)]
        for step in self.steps:
            stored = {layer.name: Scheme.parse(layer.scheme) for layer in self.plan.touched if layer.method == step.name}
            found.append(Before(size, {**found[-1].quantized, **step.method.requantized(network, found[-1]), **stored}))
        return found

    @property
    def removes_blocks(self) -> bool:
        """Whether blocks leave: without one of two random blocks a network answers something else."""
        network = self.example.network
        return any(isinstance(step.method, Method) and bool(step.method.removes(network)) for step in self.steps)

    @property
    def answered(self) -> Sequence[Call]:
        """The calls that are answered: with a cache for what quantizes that."""
        return [with_cache(call) for call in self.example.calls] if "kv_cache" in self.requires else self.example.calls

    @property
    def own_problems(self) -> list[str]:
        """What the steps say against their options and the calls, beside what they require."""
        network, calls = self.example.network, self.example.calls
        found = zip(self.steps, self.before, strict=False)
        return [why for step, before in found for why in (*step.method.problems(network, before), *step.method.unsuitable(network, calls))]

    @property
    def bounds(self) -> list[float]:
        """The largest relative error of the answer to each call."""
        method, example = self.steps[-1].method, self.example
        if (own := OWN.get(self.method, {}).get("bound")) is not None:
            bound = max(float(own), TURNED.get(self.family, 0.0))
        elif "experts" in self.requires:
            bound = FEWER_EXPERTS
        elif isinstance(method, RuntimePolicy) and method.drops_positions:
            bound = FEWER_TOKENS
        elif isinstance(method, RuntimePolicy) and method.skips_modules:
            return [min(changed, CACHED) if changed else EXACT for changed in example.changed]
        elif not self.plan.touched and self.requires & {"residual", "edges", "concatenations"}:
            bound = EXACT
        elif routed_experts(example.network.module):
            bound = TURNED.get(self.family, ROUTED_INPUTS if len(self.steps) > 1 else ROUTED)
        else:
            bound = INPUTS if "attention" in self.requires or len(self.steps) > 1 else CLOSE
        return [bound] * len(example.calls)


@cache
def case(method: str, family: str) -> Case:
    """Make it once, so that it is planned once."""
    return Case(method, family)


EXACT = 1e-5
"""Of methods that keep the function, in float32."""
CLOSE, INPUTS = 0.03, 0.05
"""Of eight bits of random weights, and of eight bits of inputs too."""
ROUTED, ROUTED_INPUTS, TURNED = 0.15, 0.2, {"internvl": 0.3}
"""Where a router picks experts, a rounding of weights, or of inputs too, can change its choice; in one call here it changes five."""
CACHED = 0.4
"""Of outputs of the steps before, and never more than what came at the first step is apart, before which nothing can be kept."""
FEWER_TOKENS = 0.9
"""Random networks listen to every token of an image alike, and half of them are gone."""
FEWER_EXPERTS = 0.7
"""Random experts all say something else, so what they say is missed where they do not speak."""


def apart(answer: Tensor, expected: Tensor) -> float:
    """Return the relative error."""
    return float((answer - expected).norm() / expected.norm())


def require_close(answer: Tensor, expected: Tensor, bound: float) -> None:
    """Raise AssertionError unless an answer is finite, near what is expected and follows it."""
    assert answer.isfinite().all()
    assert answer.shape == expected.shape
    error = apart(answer, expected)
    follows = float(torch.corrcoef(torch.stack([answer.flatten(), expected.flatten()]))[0, 1])
    assert error < bound < 1
    assert follows > (1 - bound**2) ** 0.5 - 0.05


@dataclass(frozen=True)
class Example:
    """A network that nobody changes, calls for it and what it answers."""

    network: Network
    calls: list[Call]
    expected: list[Tensor]

    @property
    def changed(self) -> list[float]:
        """How far each expected answer of a generation is from that at its first step, relatively."""
        times = [call.kwargs["timestep"].flatten()[0] for call in self.calls]
        branches = times.count(times[0])  # in calls of their own
        return [apart(self.expected[place % branches], answer) for place, answer in enumerate(self.expected)]

    def copied(self) -> Network:
        """A network to be changed."""
        return copy.deepcopy(self.network)


@cache
def example(family: str, source: Source) -> Example:
    """Build it once; what it answers is by torch's own choice of attention, also where a test that chooses another is the first to ask."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):
        if source == "pipeline":
            network, calls = PIPELINES[family]()
        else:
            network, calls = (
                open_model(FAMILIES[family].build()),
                trajectory(family) if source == "trajectory" else FAMILIES[family].calls(3),
            )
        return Example(network, calls, answers(network, calls))


@torch.no_grad()
def answers(network: Network, calls: Sequence[Call]) -> list[Tensor]:
    """What a network answers: logits where they are read, or a denoiser's prediction."""
    return [read(network.run(call), call) for call in calls]


def read(given: Any, call: Call) -> Tensor:
    """The part of an output that is read: what pads a prompt is not."""
    if not hasattr(given, "logits"):
        return given[0]
    mask = call.kwargs.get("attention_mask")
    return given.logits if mask is None else given.logits[mask.bool()]


def lacking(case: Case) -> bool:
    """Whether the network shows that it has not what the steps require."""
    return any(LACKING[requirement](case) for requirement in case.requires & LACKING.keys())


def named(case: Case, *parts: str) -> bool:
    """Whether the network has a module of one of these names."""
    return any(part in name.split(".") for name, _ in case.example.network.module.named_modules() for part in parts)


def denoises(case: Case) -> bool:
    return isinstance(case.example.network.module, diffusers.ModelMixin)


@cache
def attends(family: str) -> bool:
    """Whether a forward comes by scaled_dot_product_attention."""
    seen: list[object] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                seen.append(function)
            return function(*args, **kwargs or {})

    given = example(family, "calls")
    with Watch():
        given.network.run(given.calls[0])
    return bool(seen)


LACKING: dict[str, Callable[[Case], bool]] = {
    "experts": lambda case: not named(case, "experts"),
    "attention": lambda case: not attends(case.family),
    "kv_cache": lambda case: denoises(case),
    # Windows, layers without keys, and attention that is no scaled_dot_product_attention.
    "decoder": lambda case: denoises(case) or not attends(case.family) or case.family in ("mistral", "gemma3"),
    "layers": lambda case: denoises(case),
    "images": lambda case: not named(case, "vision_tower", "visual"),
    "patch_grid": lambda case: case.family != "llava",  # the others merge patches, or have none
    "trajectories": lambda case: not denoises(case),
    "cached_modules": lambda case: not denoises(case),
    "block_range": lambda case: not denoises(case) or named(case, "up_blocks"),
    "skips": lambda case: not named(case, "up_blocks"),
    "concatenations": lambda case: not named(case, "up_blocks", "single_transformer_blocks"),
    "edges": lambda case: False,  # each of these families has some
    "feed_forwards": lambda case: False,  # the same; where no setting counts its channels, the method says so
    "heads": lambda case: case.family == "flux",  # what it attends to is read together with an FFN, or by two layers
    "filters": lambda case: not named(case, "up_blocks"),
    "residual": lambda case: denoises(case) or named(case, "pre_feedforward_layernorm"),
    # Elsewhere class labels, pooled text or the guidance scale enter beside the step.
    "time_path": lambda case: case.family not in ("unet", "pixart", "cogvideox", "wan"),
    "replays": lambda case: case.source != "pipeline",
}
"""How a network shows that it does not have what a method may require."""
GIVEN = frozenset({"calls", "teacher", "teacher_layers", "gradients", "uncached", "dense", "pruned", "allocation", "cfg", "schedule"})
"""What every case here has: it comes with the calls, or with the steps before."""


def reachable(case: Case) -> set[str]:
    """Every linear but the head and what the family keeps, or the linears of the temporal path for methods that act on that."""
    network = case.example.network
    if "time_path" in case.requires:
        path = time_path.find(network)
        return {*path.embedding_linears, *path.projections}
    linears = {part for part, module in network.module.named_modules() if isinstance(module, nn.Linear)}
    return {linear for linear in linears if linear != "lm_head" and not matches(linear, network.family.never_quantize)}
