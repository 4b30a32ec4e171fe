"""Placement: the device that computes and the one where weights rest; moves of blocks, of batches and of outputs go through it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, map_tensors

HOST = torch.device("cpu")
"""The device on which calls and outputs of blocks are kept."""
Device = torch.device | str
"""A device, or its name: auto, cpu, cuda, cuda:1, mps, xpu."""
AUTO: Literal["auto"] = "auto"
"""The accelerator that torch reports, else the CPU; for a module that is in memory, where its weights are."""


def find_device(name: Device = AUTO) -> torch.device:
    """Return the device of this name, with its number; `auto` is the accelerator that torch reports, else the CPU.

    Raises AerogelError for a name that torch does not know and for a device that is not here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == AUTO:
        name = accelerator or HOST
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AerogelError(f"device {str(name)!r} is unknown; give auto, cpu, cuda, cuda:1, mps or xpu") from error
    if device.type == HOST.type:
        return HOST
    if accelerator is None or device.type != accelerator.type:
        here = f"cpu and {accelerator.type}" if accelerator is not None else "cpu only"
        raise AerogelError(f"device {str(name)!r} is not here: torch {torch.__version__} finds {here}; give device auto, or one of these")
    count = torch.accelerator.device_count()
    number = torch.accelerator.current_device_index() if device.index is None else device.index
    if number >= count:
        raise AerogelError(f"device {str(name)!r} is not here: there are {count} of {device.type}, numbered from 0; give another number")
    return torch.device(device.type, number)


@dataclass(frozen=True)
class Placement:
    """Devices of a network."""

    device: torch.device = HOST
    """Computes."""
    storage: torch.device = HOST
    """Keeps the weights of blocks between their visits; the same as `device` where they stay there."""

    @classmethod
    def at(cls, device: torch.device) -> Placement:
        """Return the placement of a network whose weights stay where they are computed with."""
        return cls(device, device)

    @classmethod
    def of(cls, module: nn.Module) -> Placement:
        """Return the placement of a module that stays where its weights are."""
        return cls.at(next((p.device for p in module.parameters() if p.device.type != "meta"), HOST))

    @property
    def moves_weights(self) -> bool:
        """True where weights are brought in for a visit."""
        return self.device != self.storage

    @property
    def on_accelerator(self) -> bool:
        """True where another device than the CPU computes."""
        return self.device.type != HOST.type

    def bring(self, tree: Any) -> Any:
        """Return nested tensors on the computing device; what was one tensor stays one."""
        return _moved(tree, self.device)

    def take_back(self, tree: Any) -> Any:
        """Return nested tensors on the host; what was one tensor stays one."""
        return _moved(tree, HOST)

    def bring_calls(self, calls: Sequence[Call]) -> list[Call]:
        """Return calls on the computing device, for who looks at them all at once; what they share stays shared."""
        return [Call(*parts) for parts in self.bring([(call.args, call.kwargs) for call in calls])]

    def bring_weights(self, module: nn.Module, skip: Collection[nn.Module] = ()) -> None:
        """Move a module's weights and buffers to the computing device, without those below modules in `skip`."""
        move(module, self.device, skip)

    def return_weights(self, module: nn.Module) -> None:
        """Move a module's weights and buffers to where they rest."""
        move(module, self.storage)

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """Hold a module on the computing device for a while."""
        if not self.moves_weights:
            yield
            return
        try:
            self.bring_weights(module)
            yield
        finally:
            self.return_weights(module)

    @contextmanager
    def glue_resident(self, module: nn.Module, blocks: Collection[nn.Module]) -> Iterator[None]:
        """Hold what is around the blocks on the computing device for a while, and the parts of blocks that it calls (as DiT's does)."""
        if not self.moves_weights:
            yield
            return

        def bring(part: nn.Module, _: Any) -> None:
            self.bring_weights(part)

        with ExitStack() as stack:
            stack.callback(self.return_weights, module)
            self.bring_weights(module, blocks)
            for part in {part for block in blocks for part in block.modules()} - set(blocks):
                stack.callback(part.register_forward_pre_hook(bring).remove)
            yield

    def memory(self) -> int | None:
        """Return the bytes of memory that the computing device has; None where it does not tell."""
        return device_memory(self.device) if self.on_accelerator else host_memory()

    def release_memory(self) -> None:
        """Give memory that torch keeps for later back to the device, after a failed attempt to get some."""
        if self.on_accelerator:
            torch.accelerator.empty_cache()


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turn the end of a device's memory into an AerogelError that says what does not fit there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(f"{what} does not fit into the memory of the device ({reason}); give device cpu, or another device") from error


def host_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory of an accelerator; None where torch cannot tell."""
    try:
        return int(torch.accelerator.get_memory_info(device)[1])
    except RuntimeError:  # some backends count nothing
        return None


def move(module: nn.Module, device: torch.device, skip: Collection[nn.Module] = ()) -> None:
    """Move parameters and buffers that have values, also buffers that are never saved; what was shared stays shared."""
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor | None) -> Any:
        if tensor is None or tensor.is_meta or tensor.device == device:
            return tensor
        if id(tensor) not in moved:
            made = tensor.detach().to(device)
            moved[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return moved[id(tensor)]

    for part in _parts(module, skip):
        for places in (part._parameters, part._buffers):
            for key, tensor in places.items():
                places[key] = there(tensor)


def _parts(module: nn.Module, skip: Collection[nn.Module]) -> Iterator[nn.Module]:
    if any(module is other for other in skip):
        return
    yield module
    for child in module.children():
        yield from _parts(child, skip)


def _moved(tree: Any, device: torch.device) -> Any:
    """Return nested tensors on a device; meta tensors stay what they are."""
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.device == device:
            return tensor
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    return map_tensors(there, tree)
