"""Overflow: the first linear layer or block of a forward whose input or output is not finite, and how large it is in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import Stop, patch_forward, temporary_hooks, until
from aerogel.model.network import Network
from aerogel.numerics.ranges import ADVICE, ends_at

if TYPE_CHECKING:
    from aerogel.model.walk import Residency

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Overflow:
    """A tensor that is not finite."""

    name: str
    """Full name of the linear layer or the block that reads or gives it."""
    side: Side
    dtype: torch.dtype
    largest: float
    """Its largest magnitude where the block, or a layer outside of blocks, computes in float32; infinite where it overflows there too."""

    @property
    def error(self) -> AerogelError:
        """Error to raise: it names the layer, the number and a remedy."""
        if self.dtype == torch.float16:
            reached = f"overflows in float16: {self.largest:.5g} in float32, and {ends_at(self.dtype)}; {ADVICE}"
        else:
            reached = f"is not finite (largest magnitude {self.largest:.5g}); check the weights and the calibration data"
        return AerogelError(f"{self.name}: its {self.side} {reached}")


def first_overflow(network: Network, call: Call, residency: Residency | None = None) -> Overflow | None:
    """Run a call up to the first tensor that is not finite; None where all are.

    With `residency` one block is resident at a time, else all weights are where they are computed with.
    """
    blocks = network.blocks()
    layers = {name: part for name, part in network.module.named_modules() if isinstance(part, Layer | QuantLinear)}
    watch = _Watch()
    with nullcontext() if residency is None else network.glue_on_device():
        with until(watch.stop), temporary_hooks(watch.hooks(blocks, layers)), _streamed(blocks, residency):
            network.run(call)
        if watch.found is None:
            return None
        block = next((block for block in blocks if watch.found[0] == block or watch.found[0].startswith(f"{block}.")), "")
        with _resident(block, residency) if block else nullcontext():
            return watch.overflow(block, blocks[block] if block else layers[watch.found[0]])


def require_finite(name: str, block: nn.Module, call: Call, output: Any) -> None:
    """Raise AerogelError, with the first layer that overflows, where a block gives numbers that are not finite."""
    if _is_finite(_main(output)):
        return
    watch, inner = _Watch(), {f"{name}.{part}": layer for part, layer in block.named_modules() if isinstance(layer, Layer | QuantLinear)}
    with until(watch.stop), temporary_hooks(watch.hooks({name: block}, inner)), torch.no_grad():
        block(*call.args, **call.kwargs)
    if watch.found is None:
        raise AerogelError(f"{name}: its output holds NaN or infinity; check the weights and the calibration data")
    raise watch.overflow(name, block).error


class _Watch:
    """Looks at what goes into modules and comes out, and stops the forward at what is not finite."""

    def __init__(self) -> None:
        self.stop = Stop()
        self.found: tuple[str, Side, torch.dtype] | None = None
        self.of_block = self.of_layer = Call()
        """The inputs of the last block and of the last linear layer."""

    def hooks(self, blocks: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> list[RemovableHandle]:
        """Put hooks on modules, given by full name."""
        found = [module.register_forward_pre_hook(partial(self._before_block, name), with_kwargs=True) for name, module in blocks.items()]
        found += [module.register_forward_pre_hook(partial(self._before_layer, name), with_kwargs=True) for name, module in layers.items()]
        return [*found, *(module.register_forward_hook(partial(self._after, name)) for name, module in (*layers.items(), *blocks.items()))]

    def overflow(self, unit: str, module: nn.Module) -> Overflow:
        """Return what was found in a block, or in a layer outside of blocks (which has no `unit`)."""
        assert self.found is not None
        name, side, dtype = self.found
        inner = name.removeprefix(unit).removeprefix(".") if unit else ""
        return Overflow(name, side, dtype, _largest(module, self.of_block if unit else self.of_layer, inner, side))

    def _before_block(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.of_block = Call(args, kwargs)
        self._look(name, "input", _first(args, kwargs))

    def _before_layer(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.of_layer = Call(args, kwargs)
        self._look(name, "input", _first(args, kwargs))

    def _after(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._look(name, "output", _main(output))

    def _look(self, name: str, side: Side, given: Any) -> None:
        if not _is_finite(given):
            self.found = (name, side, given.dtype)
            raise self.stop


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument; others may be masks, which may be infinite."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _main(output: Any) -> Any:
    """The first tensor of an output; others may be masks too."""
    return next(iter(tensors_in(output)), None)


def _is_finite(given: Any) -> bool:
    return not isinstance(given, Tensor) or not given.is_floating_point() or bool(given.isfinite().all())


def _streamed(blocks: Mapping[str, nn.Module], residency: Residency | None) -> AbstractContextManager[None]:
    """Bring each block's weights in while it runs."""
    if residency is None:
        return nullcontext()

    def forward_of(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _resident(name, residency):
                return own(*args, **kwargs)

        return forward

    return patch_forward({module: forward_of(name, module.forward) for name, module in blocks.items()})


@contextmanager
def _resident(block: str, residency: Residency | None) -> Iterator[None]:
    with ExitStack() as stack:
        if residency is not None:
            stack.callback(residency.release, block)  # also when the memory ends while it comes in
            residency.enter(block)
        yield


def _largest(module: nn.Module, call: Call, inner: str, side: Side) -> float:
    """Return the largest magnitude that a part of a module reads or gives, where a copy of the module computes in float32."""
    seen: list[float] = []

    def see(given: Any) -> None:
        if isinstance(given, Tensor) and given.is_floating_point() and given.numel():
            seen.append(float(given.abs().max()))

    twin = copy.deepcopy(module).float()
    part = twin.get_submodule(inner)
    before = part.register_forward_pre_hook(lambda _, args, kwargs: see(_first(args, kwargs)), with_kwargs=True)
    after = part.register_forward_hook(lambda _, args, output: see(_main(output)))
    (before if side == "output" else after).remove()
    wide = call.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    with temporary_hooks([before, after]), torch.no_grad():
        twin(*wide.args, **wide.kwargs)
    return max((value if math.isfinite(value) else math.inf for value in seen), default=math.inf)
