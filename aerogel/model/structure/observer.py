"""The observer of a forward: it sees every product that reads a parameter, and may change what goes in or comes out, or skip it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aerogel.model.calls import map_tensors

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
# Position of the weight among the arguments; the input stands before it.
_SECOND = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
_THIRD = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
_GROUPED = tuple(getattr(owner, name) for owner, name in ((torch, "_grouped_mm"), (functional, "grouped_mm")) if hasattr(owner, name))
_PRODUCTS: dict[Any, int] = dict.fromkeys((*_SECOND, *_GROUPED), 1) | dict.fromkeys(_THIRD, 2)
_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d, functional.conv1d, functional.conv2d, functional.conv3d}
_GROUPS = 6  # position of `groups` among the arguments of a convolution


@dataclass(eq=False)
class Read:
    """One product of a forward that reads a parameter, or a view of one."""

    name: str
    """The parameter."""
    start: tuple[int, ...]
    """Index in the parameter where the view begins."""
    turn: int
    """Number of products of this forward that read the same view before."""
    x: Tensor
    x_dim: int
    """Dimension of the input that the product sums over."""
    in_dim: int | None
    """Dimension of the parameter that the product sums over; None where it cannot be told from the view."""
    out_dim: int | None
    """Dimension of the parameter that becomes the outputs."""
    y_dim: int
    """Dimension of the result that holds the outputs."""
    outputs: int
    """Outputs of the view."""
    func: Callable[..., Any]
    given: Callable[[Any], tuple[Any, ...]]
    """The arguments of the product, with another input."""
    kwargs: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """Identity of the product among those of a forward."""
        return self.name, self.start, self.turn

    def shape(self) -> torch.Size:
        """Shape of the result, which is not computed."""
        if self.func is functional.embedding:
            return torch.Size((*self.x.shape, self.outputs))
        if self.func is functional.linear or self.func in _GROUPED:  # the latter take bfloat16 only on meta
            return torch.Size((*self.x.shape[:-1], self.outputs))
        args, kwargs = map_tensors(lambda tensor: tensor.to("meta"), (self.given(self.x), dict(self.kwargs)))
        result: Tensor = self.func(*args, **kwargs)
        return result.shape


class Observer(TorchFunctionMode):
    """Shows each product with a parameter to `answer(read)`, which may return its result, then to `after(read, result)`, which may change
    it.

    What is looked up in a table is shown too. With `double` everything is computed in float64, also where the code of the model asks for
    less: a norm that casts to float32 would hide small differences.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        answer: Callable[[Read], Tensor | None] | None = None,
        after: Callable[[Read, Tensor], Tensor | None] | None = None,
        double: bool = True,
    ) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in parameters.items() if tensor.numel()}
        self._answer, self._after, self._double = answer, after, double
        self._turns: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._double:
            if func in _CASTS:
                return args[0].double()
            args, kwargs = _widened(args, kwargs)
        read = self._product(func, args, kwargs)
        if read is None:
            return func(*args, **kwargs)
        result = self._answer(read) if self._answer is not None else None
        if result is None:
            result = func(*args, **kwargs)
        changed = self._after(read, result) if self._after is not None else None
        return result if changed is None else changed

    def _find(self, tensor: Any) -> tuple[str, Tensor] | None:
        """The parameter that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.ndim < 2:
            return None
        return self._known.get(tensor.untyped_storage().data_ptr())

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
        if func is functional.embedding:
            return self._look_up(func, args, kwargs)
        if func in _PRODUCTS:
            return self._matrix_product(func, args, kwargs)
        if func in _CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        return self._einsum(func, args, kwargs) if func is torch.einsum else None

    def _look_up(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
        index = args[0] if args else kwargs["input"]
        table = args[1] if len(args) > 1 else kwargs["weight"]
        found = self._find(table)
        return (
            None
            if found is None
            else self._read(found, table, index, index.ndim - 1, (0, 1, -1), func, lambda new: (new, *args[1:]), kwargs)
        )

    def _matrix_product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
        weight_at = _PRODUCTS[func]
        x_at = weight_at - 1
        if func is functional.linear and len(args) == 1 and "weight" in kwargs:
            args, kwargs = (args[0], kwargs["weight"]), {key: value for key, value in kwargs.items() if key != "weight"}
        if len(args) <= weight_at:
            return None
        x, weight = args[x_at], args[weight_at]
        if (found := self._find(weight)) is not None:
            last = weight.ndim - 1
            inputs, outputs = (last, last - 1) if func is functional.linear else (last - 1, last)
            places = (inputs, outputs, -1)
            return self._read(found, weight, x, x.ndim - 1, places, func, lambda new: (*args[:x_at], new, *args[x_at + 1 :]), kwargs)
        if func is not functional.linear and (found := self._find(x)) is not None and weight.ndim > 1:
            # The weight stands on the left: W @ x.
            places = (x.ndim - 1, x.ndim - 2, -2)
            given: Callable[[Any], tuple[Any, ...]] = lambda new: (*args[:weight_at], new, *args[weight_at + 1 :])  # noqa: E731
            return self._read(found, x, weight, weight.ndim - 2, places, func, given, kwargs)
        return None

    def _convolution(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        groups = kwargs.get("groups", args[_GROUPS] if len(args) > _GROUPS else 1)
        found = self._find(weight)
        # A convolution with groups works on each channel, or on each group of channels, by itself.
        if found is None or not args or groups > 1:
            return None
        dim = args[0].ndim - weight.ndim + 1
        return self._read(found, weight, args[0], dim, (1, 0, dim), func, lambda new: (new, *args[1:]), kwargs)

    def _einsum(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
        operands = args[1:] if len(args) == 3 else tuple(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else ()
        if len(operands) != 2 or not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
            return None
        left, result = args[0].replace(" ", "").split("->")
        letters = left.split(",")
        for at in (1, 0):
            weight, x = operands[at], operands[1 - at]
            if (found := self._find(weight)) is None:
                continue
            of_weight, of_x = letters[at], letters[1 - at]
            summed = [letter for letter in of_weight if letter in of_x and letter not in result]
            given = [letter for letter in of_weight if letter in result and letter not in of_x]
            if len(summed) != 1 or len(given) != 1:
                return None
            (inputs,), (outputs,) = summed, given
            places = (of_weight.index(inputs), of_weight.index(outputs), result.index(outputs))
            return self._read(found, weight, x, of_x.index(inputs), places, func, partial(_operands, args[0], weight, at), kwargs)
        return None

    def _read(
        self,
        found: tuple[str, Tensor],
        view: Tensor,
        x: Tensor,
        x_dim: int,
        places: tuple[int, int, int],
        func: Callable[..., Any],
        given: Callable[[Any], tuple[Any, ...]],
        kwargs: Mapping[str, Any],
    ) -> Read:
        """`places` are the dimensions of the view that hold inputs and outputs, and that of the result that holds the outputs."""
        (name, base), (inputs, outputs, y_dim) = found, places
        in_dim, out_dim = _dimension(base, view, inputs), _dimension(base, view, outputs)
        if in_dim is None:
            in_dim = _by_size(base, view.shape[inputs], out_dim)
        if out_dim is None:
            out_dim = _by_size(base, view.shape[outputs], in_dim)
        start = _start(base, view)
        self._turns[name, start] += 1
        turn = self._turns[name, start] - 1
        return Read(name, start, turn, x, x_dim, in_dim, out_dim, y_dim, view.shape[outputs], func, given, kwargs)


@contextmanager
def double_by_default() -> Iterator[None]:
    """Make float64 what tensors are made in that name no dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _operands(equation: str, weight: Tensor, weight_at: int, x: Tensor) -> tuple[Any, ...]:
    return (equation, x, weight) if weight_at else (equation, weight, x)


def _widened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with float64 in the place of every narrower float type."""
    if any(isinstance(value, torch.dtype) and value in _NARROW for value in args):
        args = tuple(torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value for value in args)
    return args, kwargs | {"dtype": torch.float64} if kwargs.get("dtype") in _NARROW else kwargs


def _dimension(base: Tensor, view: Tensor, dim: int) -> int | None:
    """The dimension of a parameter that a dimension of its view is, told by strides; None where several have the same."""
    fitting = [place for place in range(base.ndim) if base.stride(place) == view.stride(dim) and base.shape[place] > 1]
    return fitting[0] if len(fitting) == 1 else None


def _by_size(base: Tensor, size: int, other: int | None) -> int | None:
    return next((place for place in range(base.ndim) if base.shape[place] == size and place != other), None)


def _start(base: Tensor, view: Tensor) -> tuple[int, ...]:
    offset, start = int(view.storage_offset()) - int(base.storage_offset()), [0] * base.ndim
    strides = [int(base.stride(dim)) for dim in range(base.ndim)]
    for place in sorted(range(base.ndim), key=lambda dim: -strides[dim]):
        if strides[place]:
            start[place], offset = divmod(offset, strides[place])
    return tuple(start)
