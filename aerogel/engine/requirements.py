"""Checks of what methods require of a model, before any work: without a forward, and without reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from aerogel.errors import AerogelError, reasons
from aerogel.layers.signature import arguments_of
from aerogel.methods.base import Before, Method, Requirement, RuntimePolicy
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.kv_cache import require_places
from aerogel.model.layer_removal import decoder_layers
from aerogel.model.narrowing import WORDS
from aerogel.model.network import Network
from aerogel.model.structure.coupled import Kind
from aerogel.model.walk import blocks_of
from aerogel.recipe import Recipe, Step
from aerogel.runtime.attention import require_torch_attention
from aerogel.runtime.expert_skipping.routing import shape_of
from aerogel.runtime.feature_cache.block_cache import hidden_states_of
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.replay import sampler_of
from aerogel.runtime.feature_cache.skip_connections import skips_of
from aerogel.runtime.token_types import require_vision
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.images import patch_grid

Look = Callable[[Network, Step, Sequence[Step]], object]
"""Raises AerogelError where a model does not have what a step requires; the last argument are the steps before it."""


def unmet(network: Network, step: Step, earlier: Sequence[Step], before: Before) -> list[str]:
    """Return why a step cannot be done to a model that finds it after `earlier`; empty where nothing speaks against it."""
    looks = [look for requirement, look in LOOKS.items() if requirement in step.method.requires]
    missing = [why for look in looks for why in reasons(partial(look, network, step, earlier))]
    # What a model lacks, it often lacks for several reasons; the first is the plainest, and options mean nothing then.
    return [_of(step, why) for why in missing[:1] or step.method.problems(network, before)]


def unmet_by_calls(network: Network, recipe: Recipe, calls: Sequence[Call]) -> Iterator[str]:
    """Yield why recorded calls do not serve the steps of a recipe; runs no forward."""
    for step in recipe.steps:
        for why in step.method.unsuitable(network, calls):
            yield _of(step, why)


def _of(step: Step, why: str) -> str:
    return why if why.startswith(step.name) else f"{step.name}: {why}"


def _uncached(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    for other in reversed(earlier):
        if not _skips_modules(other):
            continue
        if _skips_modules(step):
            raise AerogelError(f"{step.name} comes after {other.name}, and a model has one feature cache; leave one of them out")
        raise AerogelError(f"{step.name} comes after {other.name}, but needs a model of which every module runs; put {other.name} last")


def _dense(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    for other in earlier:
        if other.method.prunes:
            raise AerogelError(
                f"{step.name} comes after {other.name} and would fill the zeros that it makes; put {step.name} before {other.name}"
            )


def _pruned(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    if not any(other.method.prunes for other in earlier):
        raise AerogelError(f"{step.name} adjusts pruned layers, and no step before it prunes; put one before it, such as magnitude")


def _allocation(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    if not any(other.method.allocates for other in earlier):
        raise AerogelError(
            f"{step.name} has sparsity: null and comes after no step that gives layers their shares; put one before it, or set a sparsity"
        )


def _teacher(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    for other in earlier:
        if isinstance(other.method, Method) and other.method.removes(network):
            raise AerogelError(
                f"{step.name} compares with the original model, and {other.name} before it removes layers; "
                f"put {step.name} before {other.name}"
            )
        if other.method.reorders == "blocks":
            raise AerogelError(
                f"{step.name} compares with the original model, and {other.name} before it gives blocks another basis; "
                "leave one of them out"
            )


def _teacher_layers(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    for other in earlier:
        if other.method.reorders == "layers":
            raise AerogelError(
                f"{step.name} compares layers with those of the original model, and {other.name} before it gives channels between them "
                "another order or scale; leave one of them out, or choose options by which they do not"
            )


def _layers(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    for other in earlier:
        if isinstance(other.method, RuntimePolicy):
            raise AerogelError(f"{step.name} comes after {other.name}, which was measured on all layers; put {other.name} behind it")
    decoder_layers(network)


def _coupled(kind: Kind, network: Network, step: Step, earlier: Sequence[Step]) -> None:
    """Look for coupled channels that no earlier step has removed, and on which no policy was measured."""
    for other in earlier:
        if isinstance(other.method, RuntimePolicy):
            raise AerogelError(f"{step.name} comes after {other.name}, which was measured on all channels; put {other.name} behind it")
        if kind in other.method.requires:
            raise AerogelError(f"{step.name} comes after {other.name}, which removes the same kind of channels; leave one of them out")
    if not any(one.kind == kind for found in network.coupled.values() for one in found):
        raise AerogelError(f"this {network.family.name} model has no {WORDS[kind]} that can leave a block; leave {step.name} out")


def _edges(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    if not any(block.edges() for block in blocks_of(network)):
        raise AerogelError(
            f"{step.name} needs a norm or a linear layer whose channels other layers read as they are; "
            f"this {network.family.name} model has none ({_why_no_edges(network)}); leave this step out"
        )


def _why_no_edges(network: Network) -> str:
    found = next((edges for edges in network.edges.values()), None)
    if found is None:
        return "it has no blocks"
    return next((f"{name}: {why}" for name, why in found.refused.items()), found.no_stream)


def _decoder(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    """Look for one row of blocks whose tokens no earlier step drops or evicts."""
    decoder_of(network)
    for other in earlier:
        if "decoder" in other.method.requires:
            raise AerogelError(f"{step.name} comes after {other.name}, and one policy drops or evicts tokens; leave one of them out")


def _trajectories(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    if "timestep" not in arguments_of(network.module):
        raise AerogelError(
            f"this {network.family.name} model takes no time step, and feature caching needs a denoiser; leave this step out"
        )


def _concatenations(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    """Look for skip connections, and for a linear that joins what modules beside each other give."""
    if network.family.skips is None and not any(module.parts for module in network.family.cached_modules):
        raise AerogelError(f"no float layer of this {network.family.name} model reads concatenated channels; leave {step.name} out")


def _schedule(network: Network, step: Step, earlier: Sequence[Step]) -> None:
    policies = [one.method for one in earlier if isinstance(one.method, RuntimePolicy)]
    if isinstance(step.method, RuntimePolicy) and (why := step.method.refusal(policies[-1] if policies else None)):
        raise AerogelError(why)


def _skips_modules(step: Step) -> bool:
    return isinstance(step.method, RuntimePolicy) and step.method.skips_modules


LOOKS: Mapping[Requirement, Look] = {
    "uncached": _uncached,
    "dense": _dense,
    "teacher": _teacher,
    "teacher_layers": _teacher_layers,
    "pruned": _pruned,
    "allocation": _allocation,
    "edges": _edges,
    "experts": lambda network, *_: shape_of(network),
    "attention": lambda network, *_: require_torch_attention(network),
    "kv_cache": lambda network, *_: require_places(network),
    "decoder": _decoder,
    "layers": _layers,
    "feed_forwards": partial(_coupled, "feed_forwards"),
    "heads": partial(_coupled, "heads"),
    "filters": partial(_coupled, "filters"),
    "patch_grid": lambda network, *_: patch_grid(network),
    "images": lambda network, *_: require_vision(network),
    "time_path": lambda network, *_: time_path.find(network).require_alone(),
    "cached_modules": lambda network, *_: cached_modules_of(network),
    "block_range": lambda network, *_: hidden_states_of(network),
    "skips": lambda network, *_: skips_of(network),
    "concatenations": _concatenations,
    "schedule": _schedule,
    "trajectories": _trajectories,
    "replays": lambda network, *_: sampler_of(network),
}
"""Requirements that the model alone decides, the most particular first.

Calls and gradients the engine gives to every step; `residual` has a check of its own in the method, and guidance in one
batch shows in the recorded calls.
"""
