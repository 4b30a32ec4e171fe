"""The modules of a denoiser, in the order in which they run, with what they cost: the parts whose outputs can be kept for later steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from aerogel.errors import AerogelError
from aerogel.kernels.synchronized_clock import now
from aerogel.layers.conv import QuantConv2d
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call, bytes_in
from aerogel.model.hooks import patch_forward, uncompiled
from aerogel.model.network import Network


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Operations that torch's counter does not know."""


def operations() -> FlopCounterMode:
    """A context that counts floating-point operations of products, convolutions and attentions: two for each multiply-accumulate."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


@dataclass(frozen=True)
class BoundModule:
    """A module of one network."""

    name: str
    """Full name of its module."""
    kind: str
    norms: tuple[str, ...]
    """Full names of the modules that only it reads, and maybe another module that names them too."""
    parts: tuple[str, ...]
    """Full names of the modules whose work is the module's own."""


@dataclass(frozen=True)
class Costs:
    """Costs of a forward, and of each of its modules."""

    macs: float
    """Multiply-accumulates of the whole forward."""
    module_macs: tuple[float, ...]
    module_bytes: tuple[int, ...]
    """Of what each module gives."""

    @property
    def fixed(self) -> float:
        """Multiply-accumulates outside of the modules."""
        return self.macs - sum(self.module_macs)


def cached_modules_of(network: Network) -> dict[str, BoundModule]:
    """The modules by full name, block after block; raises AerogelError for a family that names none."""
    found = {}
    for module in network.family.cached_modules:
        for name in network.named(module.glob):
            beside = name.rpartition(".")[0]
            norms, parts = ([f"{beside}.{other}" for other in others] for others in (module.norms, module.parts))
            found[name] = BoundModule(name, module.kind, tuple(norms), tuple(parts))
    if not found:
        raise AerogelError(
            f"the {network.family.name} family names no modules whose outputs could be cached (cached_modules in aerogel/families)"
        )
    places = {name: place for place, (name, _) in enumerate(network.module.named_modules())}
    blocks = [name.rpartition(".")[0] for name in found]
    first = {block: min(places[name] for name in found if name.rpartition(".")[0] == block) for block in blocks}
    return dict(sorted(found.items(), key=lambda item: first[item[0].rpartition(".")[0]]))


@torch.no_grad()
def costs_of(network: Network, call: Call) -> Costs:
    """Count one forward as it is written; attention and quantized layers count like the floats they stand for."""
    names = list(cached_modules_of(network))
    macs, sizes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    written_out: dict[nn.Module, Callable[..., Any]] = {
        module: partial(_written_out, module) for module in network.module.modules() if isinstance(module, QuantLinear)
    }
    with operations() as counter, patch_forward(written_out):

        def counted(name: str, part: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = counter.get_total_flops()
            made = own(*args, **kwargs)
            macs[name] += (counter.get_total_flops() - before) / 2
            sizes[name] += bytes_in(made) if part == name else 0
            return made

        with uncompiled(network.module), patch_forward(_around(network, counted)):
            network.run(call)
        total = counter.get_total_flops() / 2
    return Costs(total, tuple(macs.values()), tuple(sizes.values()))


@torch.no_grad()
def seconds_of(network: Network, call: Call, rounds: int = 5) -> tuple[float, tuple[float, ...]]:
    """The median wall-clock seconds of a forward, and of each module in it; compiled blocks run as they are written."""
    names = list(cached_modules_of(network))
    taken: dict[str, list[float]] = {name: [] for name in names}
    whole: list[float] = []

    def timed(name: str, _: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = now(network.device)
        made = own(*args, **kwargs)
        taken[name][-1] += now(network.device) - start
        return made

    with uncompiled(network.module), patch_forward(_around(network, timed)):
        for _ in range(rounds + 1):
            for seconds in taken.values():
                seconds.append(0.0)
            start = now(network.device)
            network.run(call)
            whole.append(now(network.device) - start)
    return median(whole[1:]), tuple(median(seconds[1:]) for seconds in taken.values())


def _around(network: Network, do: Callable[..., Any]) -> dict[nn.Module, Callable[..., Any]]:
    """Return the function that runs for each module and its parts: `do` gets the names of both and the module's own forward."""
    find = network.module.get_submodule
    pairs = [(name, part) for name, module in cached_modules_of(network).items() for part in (name, *module.parts)]
    return {find(part): partial(do, name, part, find(part).forward) for name, part in pairs}


def _written_out(layer: QuantLinear, x: Tensor) -> Tensor:
    """Return the float product, which the counter can read."""
    weight_OI, bias = layer.dequantized(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    if not isinstance(layer, QuantConv2d):
        return linear(x, weight_OI, bias)
    window = layer.window
    kernel_OCHW = weight_OI.unflatten(1, (-1, *window.kernel))
    return conv2d(x, kernel_OCHW, bias, window.stride, window.padding, window.dilation, window.groups)
