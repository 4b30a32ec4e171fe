"""The temporal path of a denoiser: what it makes of the time step before an image enters, found in a network and run by itself.

T steps, C channels of the sinusoid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from aerogel.errors import AerogelError
from aerogel.layers.conv import size
from aerogel.layers.signature import arguments_of
from aerogel.model.calls import Call, map_tensors
from aerogel.model.hooks import Stop, capture_inputs, until
from aerogel.model.network import Network
from aerogel.model.structure.time_layers import STEPS

Given = TypeVar("Given")


@dataclass(frozen=True)
class TemporalPath:
    """The embedder of the time step and every linear that projects it for a block."""

    embedders: dict[str, nn.Module]
    """By full name; several are copies that all see the same sinusoid."""
    projections: dict[str, nn.Module]
    """By full name, in the network's own order."""
    others: tuple[str, ...]
    """Other inputs that enter before the projections; without any, the temporal features depend on the time step alone."""

    @property
    def embedding_linears(self) -> dict[str, nn.Module]:
        """The linear layers inside the embedders by full name, in order."""
        return {
            f"{name}.{part}": module
            for name, embedder in self.embedders.items()
            for part, module in embedder.named_modules()
            if hasattr(module, "in_features")
        }

    @property
    def widths(self) -> dict[str, int]:
        """The width of each temporal feature."""
        return {name: size(projection)[1] for name, projection in self.projections.items()}

    @property
    def parameters(self) -> int:
        """Weights and biases of the path."""
        modules = [*self.embedders.values(), *self.projections.values()]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def float(self) -> TemporalPath:
        """A copy in float32, whatever the network is computed in."""
        embedders, projections = copy.deepcopy((self.embedders, self.projections))
        for module in (*embedders.values(), *projections.values()):
            module.float()
        return TemporalPath(embedders, projections, self.others)

    def features(self, sinusoid_TC: Tensor) -> dict[str, Tensor]:
        """Run the path: the temporal feature (T, width) of every projection; raises AerogelError where it is not of the step alone."""
        self.require_alone()
        (embedder,) = self.embedders.values()
        activated = silu(embedder(sinusoid_TC))
        return {name: projection(activated) for name, projection in self.projections.items()}

    def require_alone(self) -> None:
        """Raise AerogelError, with the reason, unless the temporal features depend on the step alone, and on one embedding of it."""
        if self.others:
            raise AerogelError(
                f"the temporal features of this model also depend on {' and '.join(self.others)}: they cannot be computed per step; "
                "leave temporal steps out of the recipe"
            )
        if len(self.embedders) > 1:
            raise AerogelError(
                f"the time step is embedded in {len(self.embedders)} places ({', '.join(self.embedders)}), expected one; "
                "leave temporal steps out of the recipe"
            )


def find(network: Network) -> TemporalPath:
    """Find the path, by the names that the family gives or as it was discovered; raises AerogelError where there is none."""
    time = network.time
    if time is None:
        raise AerogelError(
            f"no layer of this {network.family.name} model reads the time step and no image; leave temporal steps out of the recipe"
        )
    embedders, projections = network.named(*time.embedders), network.named(*time.projections)
    for what, found, names in (("embedder", embedders, time.embedders), ("projection", projections, time.projections)):
        if not found:
            raise AerogelError(f"this {network.family.name} model has no {what} of the time step ({', '.join(names)})")
    config = network.config or {}
    others = [*time.always, *(other for setting, other in time.others if config.get(setting))]
    return TemporalPath(embedders, projections, tuple(dict.fromkeys(others)))


def check(network: Network, path: TemporalPath, call: Call) -> list[str]:
    """Run a call and return the projections' names in the order in which a forward reaches them.

    Raises AerogelError unless every one is reached and reads silu of what the embedder gave, bit for bit.
    """
    path.require_alone()
    (embedder,) = path.embedders.values()
    embedded: list[Tensor] = []
    read: dict[str, Tensor] = {}
    handle = embedder.register_forward_hook(lambda _, __, output: embedded.append(output))
    try:
        with capture_inputs(path.projections, read.__setitem__):
            network.run(call)
    finally:
        handle.remove()
    if unreached := [name for name in path.projections if name not in read]:
        raise AerogelError(f"{unreached[0]} and {len(unreached) - 1} more projections of the time step are never reached by a forward")
    expected = silu(embedded[-1])
    # A projection that follows a clock reads one sample of each step; the first of them is the batch's first.
    if wrong := [name for name, given in read.items() if not torch.equal(given[:1], expected[:1])]:
        raise AerogelError(f"{wrong[0]} does not read the activated embedding of the time step; its features depend on something else")
    return list(read)


def sinusoids(network: Network, path: TemporalPath, call: Call, steps: Sequence[float]) -> Tensor:
    """Return the sinusoid_TC that the embedder gets at each step, from the network's own forward on one sample of `call`."""
    return torch.cat([_entered(network, path, call, step, lambda sinusoid_1C: sinusoid_1C) for step in steps])


def features_of(network: Network, call: Call, steps: Sequence[float]) -> dict[str, Tensor]:
    """Return what the embedder and every projection give at each step, (T, width) by full name in the order of a forward, on one sample.

    They are what the network uses as it is: with its scales of the step, and with the answers of a policy in their place. Raises
    AerogelError where the path is not of the step alone, and at a step that the network was not calibrated for.
    """
    path = find(network)
    order = [*path.embedders, *check(network, path, call)]

    def look(sinusoid_1C: Tensor) -> dict[str, Tensor]:
        given = {name: embedder(sinusoid_1C) for name, embedder in path.embedders.items()} | path.features(sinusoid_1C)
        return {name: given[name][:1] for name in order}  # a table answers for the whole batch of the call

    rows = [_entered(network, path, call, step, look) for step in steps]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _entered(network: Network, path: TemporalPath, call: Call, step: float, look: Callable[[Tensor], Given]) -> Given:
    """Return what `look` makes of the sinusoid_1C when a forward comes to the embedder; all time-step indices are set by then."""
    name, embedder = next(iter(path.embedders.items()))
    stop, seen, found = Stop(), list[Tensor](), list[Given]()

    def take(_: str, x: Tensor) -> None:
        if seen:
            return  # it is `look` that runs the embedder
        seen.append(x[:1].detach().clone())
        found.append(look(seen[0]))
        raise stop

    with until(stop), capture_inputs({name: embedder}, take):
        network.run(_at(network, call, step))
    return found[0]


def _at(network: Network, call: Call, step: float) -> Call:
    """The same call at another step."""
    names = arguments_of(network.module)
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    name = next(name for name in STEPS if name in given)
    before = given[name]
    given[name] = map_tensors(lambda tensor: torch.full_like(tensor, step), before) if isinstance(before, Tensor) else type(before)(step)
    return Call((), given)
