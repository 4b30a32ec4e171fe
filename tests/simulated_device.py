"""A device for tests: tensors on it live in host memory, and an operation that mixes them with others fails as on an accelerator.

It is a backend of torch like any other (`simulated:0`), so the whole package runs on it as on a GPU, and gives the numbers of the CPU.
What counts: an operand that nobody moved, a tensor made on the CPU by habit, an output that nobody brought back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"

_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# An accelerator takes positions from the host too.
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}


class _Module:
    """The functions that torch looks for in `torch.simulated`."""

    available = False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(0)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_module = _Module()


class Watch:
    """What happened on the device."""

    def __init__(self) -> None:
        self.moved_in: Counter[torch.Size] = Counter()
        """Copies from the host, by shape."""
        self.moved_out: Counter[torch.Size] = Counter()
        """Copies to the host, by shape."""
        self.operations: Counter[str] = Counter()
        self.limit: Callable[[Any, list[Tensor]], bool] = lambda op, operands: False
        """Return True for an operation that does not fit into memory."""
        self.refused = 0
        """Operations that did not fit."""
        self.memory = 1 << 40
        """Bytes that the device says it has."""

    def of_accelerator(self) -> dict[str, Callable[..., Any]]:
        """Return the functions of torch.accelerator that a backend in Python does not have."""
        return {
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_memory_info": lambda device=None: (self.memory, self.memory),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
        }


_watch = Watch()


class Placed(Tensor):
    """A tensor on the simulated device; `raw` has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device(), layout=raw.layout
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = Placed(self.raw.clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(parts if isinstance(index, tuple) else parts[0])

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.raw!r})"


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do an operation on the values and place what comes out."""
    operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    if op not in _MOVES:
        _require_placed(op, operands)
    if _watch.limit(op, operands):
        _watch.refused += 1
        raise torch.OutOfMemoryError(f"the simulated device has no memory for {op}")
    _watch.operations[str(op)] += 1
    if op is torch.ops.aten.histc.default:  # on an accelerator it also counts integers
        args = (args[0].to(torch.float32), *args[1:])
    raw_args, raw_kwargs = _values((args, kwargs))
    if target is not None and torch.device(target).type == NAME:
        raw_kwargs["device"] = torch.device("cpu")
    made = op(*raw_args, **raw_kwargs)
    if op is torch.ops.aten.copy_.default:
        _count_copy(args[0], args[1])
        return args[0]
    if op is torch.ops.aten._to_copy.default and target is not None:
        _count_copy(made if torch.device(target).type != NAME else device(), args[0])
    if target is not None and torch.device(target).type != NAME:
        return made
    placed = pytree.tree_map(lambda leaf: Placed(leaf) if isinstance(leaf, Tensor) else leaf, made)
    return return_and_correct_aliasing(op, args, kwargs, placed) if any(isinstance(one, Placed) for one in operands) else placed


def _values(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.raw if isinstance(leaf, Placed) else leaf, tree)


def _count_copy(to: Any, source: Tensor) -> None:
    there = to.type == NAME if isinstance(to, torch.device) else isinstance(to, Placed)
    if there and not isinstance(source, Placed):
        _watch.moved_in[source.shape] += 1
    elif not there and isinstance(source, Placed):
        _watch.moved_out[source.shape] += 1


def _require_placed(op: Any, operands: list[Tensor]) -> None:
    if not any(isinstance(one, Placed) for one in operands):
        return
    strangers = [one for one in operands if not isinstance(one, Placed) and (one.ndim or one.device.type != "cpu")]
    if op in _INDEXING:
        strangers = [one for one in strangers if one.is_floating_point()]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} got {tuple(strangers[0].shape)} on {strangers[0].device} "
            f"and others on {NAME}:0"
        )


class _Constructors(TorchFunctionMode):
    """Makes tensors on the device that a backend in Python cannot: from Python values, and by operations that resize their output."""

    made = (torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.eye, torch.randperm)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if func in self.made and target is not None and torch.device(target).type == NAME:
            args, kwargs = _values((args, {**kwargs, "device": torch.device("cpu")}))
            return Placed(func(*args, **kwargs))
        return func(*args, **kwargs)


@cache
def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, _module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    return library


_register()  # before the first backward of any test: autograd has queues for the devices that it knows by then


@cache
def device() -> torch.device:
    """Return the device; torch knows it from then on, and reports it as an accelerator only while `present` lasts."""
    _register()
    return torch.device(NAME, 0)


@contextmanager
def present() -> Iterator[Watch]:
    """Have torch report the device as its accelerator for a while; yields what happens there."""
    global _watch
    device()
    before, _watch = _watch, Watch()
    _module.available = True
    try:
        with _Constructors(), pytest.MonkeyPatch.context() as patch:
            for name, function in _watch.of_accelerator().items():
                patch.setattr(torch.accelerator, name, function)
            yield _watch
    finally:
        _module.available = False
        _watch = before
