"""Processes of one run, started by torchrun: each has a share of the calls and a device of its own, and all do the same steps in one order.

What they exchange goes through here, and only through here: sums of statistics, parts of results, files that the first one writes. With
one process nothing is exchanged. An exchange begins with a flag, so that a process whose memory ended can have all others do the work in
hand once more (see model/batches.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.model.calls import tensors_in
from aerogel.model.placement import AUTO, HOST, Device, find_device

Value = TypeVar("Value")
Key = TypeVar("Key", bound=Hashable)

_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: one may be writing a large model meanwhile. Where a process ends, torchrun ends the others."""


class OtherOutOfMemoryError(torch.OutOfMemoryError):
    """The memory of another process ended in the work that all are doing."""


class ProcessEndedError(AerogelError):
    """Another process has ended, so that nothing can be exchanged any more."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees it."""

    rank: int = 0
    """Number of this process."""
    count: int = 1
    on_machine: int = 1
    """How many of them are on this machine."""
    direct: frozenset[str] = frozenset({HOST.type})
    """Types of the devices from which tensors are sent directly; others go through the host."""

    @classmethod
    def started(cls) -> Processes:
        """Return the processes that torchrun started, which exchange nothing before they join; one process where it did not."""
        if not distributed.is_torchelastic_launched():
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))

    @classmethod
    def join(cls, device: Device = AUTO) -> Processes:
        """Join the processes that torchrun started; one process alone where this was not started by torchrun.

        From then on `auto` and the plain name of an accelerator mean the device with this process's number on its machine. Raises
        AerogelError for a numbered device, where a machine has fewer devices than processes, and where they joined already.
        """
        found = cls.started()
        if found.alone:
            return found
        if distributed.is_initialized():
            raise AerogelError("torch.distributed has a process group already; join before anything else makes one, and once")
        accelerator = _take_device(device, int(os.environ["LOCAL_RANK"]), found.on_machine)
        backend = "gloo"
        if accelerator:
            backend = f"cpu:gloo,{accelerator}:{distributed.get_default_backend_for_device(accelerator)}"
        distributed.init_process_group(backend, timeout=_PATIENCE)
        return replace(found, direct=frozenset({HOST.type, accelerator or HOST.type}))

    def leave(self) -> None:
        """End the exchange in good order, once nothing more will be exchanged."""
        if not self.alone:
            distributed.destroy_process_group()

    @property
    def alone(self) -> bool:
        """True where there is one process."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """True in the one process that writes files, prints and measures."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the numbers of this process's calls, of so many: neighbours, so that what is put together is in order of calls."""
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def wait(self) -> None:
        """Wait until all processes have come here; raises OtherOutOfMemoryError where one of them has to do its work once more."""
        self._meet(False)

    def ask_again(self) -> None:
        """Have the others, which are in the same work as this one, do it once more: their next exchange raises OtherOutOfMemoryError."""
        self._meet(True)

    def gather(self, value: Value) -> list[Value]:
        """Return the value that each process has, in their order; tensors must be on the host."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        self.wait()
        with _exchanging():
            distributed.all_gather_object(found, value)
        return found

    def of_first(self, work: Callable[[], Value]) -> Value:
        """Do some work in the first process and return its result in all; tensors must be on the host.

        An AerogelError there is raised in all.
        """
        if self.alone:
            return work()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made = [work(), None]
            except AerogelError as error:
                made = [None, str(error)]
        self.wait()
        with _exchanging():
            distributed.broadcast_object_list(made, 0)
        if made[1] is not None:
            raise AerogelError(made[1])
        return made[0]

    def first_then_others(self, work: Callable[[], Value]) -> Value:
        """Do some work in the first process and then in the others, which find what it fetched; the result of each must be sendable."""
        found = self.of_first(work)
        return found if self.first else work()

    def each(self, tasks: Mapping[Key, Callable[[], Value]]) -> dict[Key, Value]:
        """Do each task in one process, in turn, and return the results of all; tensors must be on the host."""
        mine = {key: work() for key, work in list(tasks.items())[self.rank :: self.count]}
        found = {key: value for part in self.gather(mine) for key, value in part.items()}
        return {key: found[key] for key in tasks}

    def add_up(self, tensor: Tensor) -> None:
        """Replace a float tensor by the sum of those of all processes."""
        self._reduce(tensor, distributed.ReduceOp.SUM)

    def take_largest(self, tensor: Tensor) -> None:
        """Replace each number of a float tensor by the largest of all processes; NaN becomes infinity, which backends compare alike."""
        if not self.alone:
            tensor.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self._reduce(tensor, distributed.ReduceOp.MAX)

    def gather_nested(self, mine: Any, device: torch.device) -> list[Any]:
        """Return what each process has, in their order, its tensors on this device; they may differ in number, shape and dtype."""
        if self.alone:
            return [mine]
        tensors = tensors_in(mine)
        numbers = iter(range(len(tensors)))
        without = pytree.tree_map(lambda leaf: _Number(next(numbers)) if isinstance(leaf, Tensor) else leaf, mine)
        found = []
        for rank, (other, kinds) in enumerate(self.gather((without, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]))):
            own = tensors if rank == self.rank else [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
            sent = [self._sent(tensor, rank) for tensor in own]
            found.append(pytree.tree_map(lambda leaf, sent=sent: sent[leaf.value] if isinstance(leaf, _Number) else leaf, other))
        return found

    def copy_first(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors the values that those of the same name have in the first process; those without values are left out."""
        if self.alone:
            return
        self.wait()
        own = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor) and not tensor.is_meta}
        with torch.no_grad():
            for _, tensor in sorted(own.items()):  # layers that were restored have theirs in another order
                if (theirs := self._sent(tensor.detach(), 0)).data_ptr() != tensor.data_ptr():
                    tensor.copy_(theirs)

    def _meet(self, again: bool) -> None:
        if self.alone:
            return
        flag = torch.tensor(float(again))
        with _exchanging():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        if flag and not again:
            raise OtherOutOfMemoryError("the memory of another process ended")

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        if self.alone:
            return
        there = self._sendable(tensor)
        self.wait()
        with _exchanging():
            distributed.all_reduce(there, how)
        if there is not tensor:
            tensor.copy_(there)

    def _sent(self, tensor: Tensor, source: int) -> Tensor:
        """Return a process's tensor, which may be in the place of this one; bytes travel, as backends do not know every dtype."""
        there = self._sendable(tensor)
        if there.numel():
            with _exchanging():
                distributed.broadcast(there.reshape(-1).view(torch.uint8), source)
        return there.to(tensor.device)

    def _sendable(self, tensor: Tensor) -> Tensor:
        return (tensor if tensor.device.type in self.direct else tensor.to(HOST)).contiguous()


@dataclass(frozen=True)
class _Number:
    """Stands for a tensor that travels by itself."""

    value: int


ALONE = Processes()
"""One process: nothing is exchanged."""


def _take_device(name: Device, number: int, on_machine: int) -> str:
    """Let the accelerator of this number be the one that is meant from now on; returns its type, or nothing where the CPU computes."""
    found = find_device(name)
    if found.type == HOST.type:
        return ""
    if name != AUTO and torch.device(name).index is not None:
        raise AerogelError(f"device {str(name)!r} is one device, and {on_machine} processes need one each; give device {found.type}")
    count = torch.accelerator.device_count()
    if on_machine > count:
        raise AerogelError(
            f"{on_machine} processes were started on a machine with {count} devices of {found.type}; give torchrun --nproc-per-node {count}"
        )
    torch.accelerator.set_device_index(number)
    return found.type


@contextmanager
def _exchanging() -> Iterator[None]:
    """Turn the failure of an exchange, which follows the end of another process, into one clear error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise ProcessEndedError(
            f"another process of this run has ended ({reason}); see what torchrun says of it, then resume the run or start it again"
        ) from error
