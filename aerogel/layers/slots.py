"""Slots: the places of a module's parameters and persistent buffers, to fill them and to send them back to meta."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from aerogel.kernels.malloc import release_pages
from aerogel.layers.linear import QuantLinear


@dataclass(frozen=True)
class Slot:
    """The place of one parameter or persistent buffer in a module tree."""

    name: str
    owner: nn.Module
    key: str
    tensor: Tensor

    def like(self, value: Tensor) -> Tensor:
        """The value as what belongs here: a parameter, or a plain tensor for a buffer."""
        if isinstance(self.tensor, nn.Parameter):
            return nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        return value

    def put(self, value: Tensor) -> None:
        """Set the place to a value made by `like`."""
        (self.owner._parameters if isinstance(value, nn.Parameter) else self.owner._buffers)[self.key] = value  # type: ignore[assignment]


def slots(module: nn.Module, prefix: str = "", skip: Collection[nn.Module] = ()) -> Iterator[Slot]:
    """Every parameter and persistent buffer below a module, shared ones once for each place, without those in `skip`."""
    if any(module is other for other in skip):
        return
    stem = f"{prefix}." if prefix else ""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield Slot(stem + key, module, key, parameter)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield Slot(stem + key, module, key, buffer)
    for key, child in module.named_children():
        yield from slots(child, stem + key, skip)


def replace(module: nn.Module, change: Callable[[Slot], Tensor]) -> None:
    """Put `change(slot)` in every place of a module; what was shared stays shared."""
    changed: dict[int, Tensor] = {}
    for slot in list(slots(module)):
        key = id(slot.tensor)
        if key not in changed:
            changed[key] = slot.like(change(slot))
        slot.put(changed[key])
    for part in module.modules():
        if isinstance(part, QuantLinear):
            part.cache.clear()


def release(module: nn.Module) -> None:
    """Send a module's parameters and persistent buffers to meta, and the memory they took back to the system."""
    replace(module, lambda slot: slot.tensor.detach().to("meta"))
    release_pages()
