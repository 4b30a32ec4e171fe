"""The units of a denoiser, in the order in which they run, with what they cost: the parts whose outputs can be kept for later steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, tensors_in
from aerogel.model.convs import QuantConv2d
from aerogel.model.hooks import answering
from aerogel.model.modules import QuantLinear
from aerogel.model.network import Network


@dataclass(frozen=True)
class BoundUnit:
    """A unit of one network."""

    name: str
    """Full name of its module."""
    kind: str
    norms: tuple[str, ...]
    """Full names of the modules that only it reads."""


@dataclass(frozen=True)
class Costs:
    """What a forward costs, and each of its units."""

    macs: float
    """Multiply-accumulates of the whole forward."""
    unit_macs: tuple[float, ...]
    unit_bytes: tuple[int, ...]
    """Of what each unit gives."""

    @property
    def fixed(self) -> float:
        """Multiply-accumulates outside of the units."""
        return self.macs - sum(self.unit_macs)


def units_of(network: Network) -> dict[str, BoundUnit]:
    """The units by full name, block after block; raises AerogelError for a family that names none."""
    found = {}
    for unit in network.family.units:
        for name in network.named(unit.modules):
            beside = name.rpartition(".")[0]
            found[name] = BoundUnit(name, unit.kind, tuple(f"{beside}.{norm}" for norm in unit.norms))
    if not found:
        raise AerogelError(f"the {network.family.name} family names no units whose outputs could be kept (units in aerogel/families)")
    places = {name: place for place, (name, _) in enumerate(network.module.named_modules())}
    blocks = [name.rpartition(".")[0] for name in found]
    first = {block: min(places[name] for name in found if name.rpartition(".")[0] == block) for block in blocks}
    return dict(sorted(found.items(), key=lambda item: first[item[0].rpartition(".")[0]]))


@torch.no_grad()
def costs_of(network: Network, call: Call) -> Costs:
    """Count one forward; attention and quantized layers count like the floats they stand for."""
    names = list(units_of(network))
    macs, sizes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    written_out: dict[nn.Module, Callable[..., Any]] = {
        module: partial(_written_out, module) for module in network.module.modules() if isinstance(module, QuantLinear)
    }
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), answering(written_out):

        def counted(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = counter.get_total_flops()
            made = own(*args, **kwargs)
            macs[name] += (counter.get_total_flops() - before) / 2
            sizes[name] += sum(tensor.nbytes for tensor in tensors_in(made))
            return made

        with answering(_around(network, names, counted)):
            network.run(call)
        total = counter.get_total_flops() / 2
    return Costs(total, tuple(macs.values()), tuple(sizes.values()))


@torch.no_grad()
def seconds_of(network: Network, call: Call, rounds: int = 5) -> tuple[float, tuple[float, ...]]:
    """The median wall-clock seconds of a forward, and of each unit in it."""
    names = list(units_of(network))
    taken: dict[str, list[float]] = {name: [] for name in names}
    whole: list[float] = []

    def now() -> float:
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)
        return time.perf_counter()

    def timed(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = now()
        made = own(*args, **kwargs)
        taken[name].append(now() - start)
        return made

    with answering(_around(network, names, timed)):
        for _ in range(rounds + 1):
            start = now()
            network.run(call)
            whole.append(now() - start)
    return median(whole[1:]), tuple(median(seconds[1:]) for seconds in taken.values())


def _around(network: Network, names: list[str], do: Callable[..., Any]) -> dict[nn.Module, Callable[..., Any]]:
    modules = {name: network.module.get_submodule(name) for name in names}
    return {module: partial(do, name, module.forward) for name, module in modules.items()}


def _written_out(layer: QuantLinear, x: Tensor) -> Tensor:
    """What the counter can read: the float product."""
    weight_OI, bias = layer.dequantized(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    if not isinstance(layer, QuantConv2d):
        return linear(x, weight_OI, bias)
    window = layer.window
    kernel_OCHW = weight_OI.unflatten(1, (-1, *window.kernel))
    return conv2d(x, kernel_OCHW, bias, window.stride, window.padding, window.dilation, window.groups)
