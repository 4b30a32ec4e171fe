"""The layers that a denoiser's time step passes before an image enters, found by following the step through a run.

A run with placeholder weights marks what depends on an input: the input asks for gradients, and then so does all that is made of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call, map_tensors, tensors_in
from aerogel.model.family import TimePath
from aerogel.model.structure.examples import Example, run
from aerogel.model.structure.placeholders import placeholder_weights

STEPS = ("timestep", "timesteps", "t")
"""Names of the argument that takes the time step."""


@torch.enable_grad()
def time_path_of(module: nn.Module, examples: Sequence[Example]) -> TimePath | None:
    """Find the embedder of the time step and the layers that project it for the blocks; None where there is no such path.

    Every other input that reaches them before the image does is named.
    """
    call = next((example.call for example in examples if not example.part and not example.call.args), None)
    names = list(inspect.signature(module.forward).parameters)
    step = next((name for name in STEPS if call is not None and name in call.kwargs), None)
    if call is None or step is None or names[0] not in call.kwargs:
        return None
    steps_and_image = [*tensors_in(call.kwargs[step]), *tensors_in(call.kwargs[names[0]])]
    rows = next((len(tensor) for tensor in steps_and_image if tensor.ndim), 1)
    try:
        followed = {name: _followed(module, call, name) for name in call.kwargs}
    except Exception:  # noqa: BLE001  attention that has no gradients, say
        return None
    steps, image = followed[step], followed[names[0]].reads.keys()
    # A row for each sample: what else the step has reached are tokens of a text, or frames, which a table of steps does not tell apart.
    path = {name: x for name, x in steps.reads.items() if name not in image and x.numel() == rows * x.shape[-1]}
    fed = {name: steps.sources_of(x, path) for name, x in path.items()}
    feeding = set().union(*fed.values())
    embedders = list(dict.fromkeys(name.rpartition(".")[0] for name in path if name in feeding))
    projections = [name for name in path if name not in feeding]
    if not embedders or not projections or any(name.startswith(tuple(f"{home}." for home in embedders)) for name in projections):
        return None
    others = [name for name, one in followed.items() if name not in (step, names[0]) and one.reads.keys() & path.keys()]
    return TimePath(tuple(embedders), tuple(projections), always=tuple(others))


class _Followed:
    """The layers that one input reaches in a run, each with what it read first."""

    def __init__(self, lookups: bool) -> None:
        self.reads: dict[str, Tensor] = {}
        self._gave: list[tuple[str, Tensor]] = []
        self._lookups = lookups

    def see(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Let a product go on from here: what it gives asks for gradients where what it read does."""
        if not (x.requires_grad or (self._lookups and not x.is_floating_point())):
            return y
        self.reads.setdefault(name, x)
        self._gave.append((name, y.requires_grad_()))
        return y * 1  # the model's code may add to it in place

    def sources_of(self, x: Tensor, layers: dict[str, Tensor]) -> set[str]:
        """Those of the layers whose outputs an input is made of."""
        if not x.requires_grad:
            return set()
        gave = [(name, y) for name, y in self._gave if name in layers]
        slopes = torch.autograd.grad(x.sum(), [y for _, y in gave], retain_graph=True, allow_unused=True)
        return {name for (name, _), slope in zip(gave, slopes, strict=True) if slope is not None}


def _followed(module: nn.Module, call: Call, argument: str) -> _Followed:
    """Follow one input: through what is made of its numbers or, where it is a number of a row of a table, from the tables on."""
    value: Any = call.kwargs[argument]
    floats = any(tensor.is_floating_point() for tensor in tensors_in(value))
    followed = _Followed(lookups=not floats and argument not in STEPS)

    def mark(tensor: Tensor) -> Tensor:
        return tensor.float().clone().requires_grad_() if tensor.is_floating_point() or argument in STEPS else tensor

    kwargs = {**call.kwargs, argument: map_tensors(mark, value)}
    with placeholder_weights(module, seen=followed.see), torch.enable_grad():
        run(module, Example("", Call((), kwargs)))
    return followed
