"""Fast twins of "F.linear with a float weight that has zeros", chosen by what was fastest when it was tried.

Zeros that lie anywhere are multiplied like other numbers: torch's products with compressed rows are slower than dense ones up to 90 %.
Zeros in whole blocks, or in a 2:4 pattern on a GPU, can be left out. Which kernel wins depends on the processor, the threads, the shape,
the zeros and the number of rows; each is timed at the first call of its kind, and the dense product is kept where none is faster.

T rows, O outputs, I inputs, B side of a block, R = O / B rows of blocks, C = I / B columns of blocks, N blocks that the fullest row keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from aerogel.kernels import selection
from aerogel.numerics.sparsity import block_of, zero_blocks, zero_share

_FEWEST_ZEROS = 0.25
"""A weight with fewer zeros is not looked at: no kernel is faster then."""
_SPARSE_CORES = (8, 0)
"""The first CUDA generation with 2:4 products."""
_TILE = (32, 64)
"""Outputs and inputs that 2:4 products handle at once."""


class SparseKernel(nn.Module, ABC):
    """A packed float weight: called with x_TI it returns y_TO in x's dtype, bias included."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def accepts(weight_OI: Tensor, dtype: torch.dtype) -> bool:
        """Return True if this kernel multiplies inputs of `dtype` on the weight's device by it, without some of its zeros."""

    @property
    @abstractmethod
    def case(self) -> Hashable:
        """The facts of the packed weight that its time depends on, apart from its shape."""


class Blocks(SparseKernel):
    """Multiplies the square blocks that are left, in one batched product: a row of blocks each, filled up with zeros to the fullest.

    On a CPU in float32 whatever the input's dtype: torch's products of 16-bit blocks take four times as long there. Its own block-sparse
    tensors (MKL) take 1.2 to 2.2 times as long as this for one row (benchmarks/results/block_sparse.json).
    """

    name = "blocks"

    @staticmethod
    def accepts(weight_OI: Tensor, dtype: torch.dtype) -> bool:
        """Zeros in square blocks of 8 to 128, on any device."""
        return dtype.is_floating_point and block_of(weight_OI) is not None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        side = block_of(weight_OI)
        assert side is not None, "accepts() said so"
        compute = torch.float32 if weight_OI.device.type == "cpu" else dtype
        kept_RC = ~zero_blocks(weight_OI, side, side)
        fullest = max(int(kept_RC.sum(1).max()), 1)
        column_RN = kept_RC.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :fullest]
        blocks_RCBB = weight_OI.detach().unflatten(0, (-1, side)).unflatten(-1, (-1, side)).transpose(1, 2)
        # Blocks that only fill a row up are zero in the weight.
        blocks_RNBB = blocks_RCBB[torch.arange(len(column_RN), device=weight_OI.device)[:, None], column_RN].to(compute)
        self.side, self.out_features = side, len(weight_OI)
        self.register_buffer("column_M", column_RN.flatten())
        self.register_buffer("blocks", blocks_RNBB.permute(0, 1, 3, 2).flatten(1, 2).contiguous())
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().to(compute))
        self.column_M: Tensor
        self.blocks: Tensor
        """The weight (R, N * B, B), inputs first."""
        self.bias: Tensor | None

    @property
    def case(self) -> Hashable:
        """The shape of its blocks."""
        return tuple(self.blocks.shape)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Gather what each row of blocks reads, and multiply all of them at once."""
        x_TCB = x_TI.to(self.blocks.dtype).unflatten(-1, (-1, self.side))
        read_RTN = x_TCB[:, self.column_M].reshape(len(x_TI), len(self.blocks), -1).transpose(0, 1)
        y_TO = torch.bmm(read_RTN, self.blocks).transpose(0, 1).reshape(len(x_TI), self.out_features)
        return (y_TO if self.bias is None else y_TO + self.bias).to(x_TI.dtype)


class SemiStructured(SparseKernel):
    """torch's product with weights that keep at most 2 of every 4 inputs, on CUDA from compute capability 8.0."""

    name = "semi_structured"

    @staticmethod
    def accepts(weight_OI: Tensor, dtype: torch.dtype) -> bool:
        """A 2:4 weight of 16 bits in whole tiles, on a GPU that has such products."""
        if weight_OI.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or weight_OI.dtype != dtype:
            return False
        if torch.cuda.get_device_capability(weight_OI.device) < _SPARSE_CORES or any(
            length % tile for length, tile in zip(weight_OI.shape, _TILE, strict=True)
        ):
            return False
        return bool((weight_OI.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all())

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = to_sparse_semi_structured(weight_OI.detach())
        self.bias = None if bias_O is None else bias_O.detach().to(dtype)

    @property
    def case(self) -> Hashable:
        """Nothing: all such weights have the same zeros for it."""
        return None

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply."""
        return linear(x_TI, self.weight, self.bias)


KERNELS: tuple[type[SparseKernel], ...] = (SemiStructured, Blocks)
_DENSE = "dense"


class SparseLinear:
    """A float weight with zeros and the kernels that leave some of them out, each packed when it is tried first."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, kernels: tuple[type[SparseKernel], ...]) -> None:
        self.weight_OI, self.bias_O, self.kernels = weight_OI, bias_O, kernels
        self._packed: dict[tuple[str, torch.dtype], SparseKernel] = {}

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> SparseLinear | None:
        """Return one for inputs of `dtype`; None for a weight whose zeros no kernel leaves out."""
        if weight_OI.ndim != 2 or weight_OI.is_meta or zero_share(weight_OI) < _FEWEST_ZEROS:
            return None
        kernels = tuple(kernel for kernel in KERNELS if kernel.accepts(weight_OI, dtype))
        return cls(weight_OI, bias_O, kernels) if kernels else None

    def fastest(self, x_TI: Tensor, dense: Callable[[Tensor], Tensor]) -> str:
        """Return the name of the fastest kernel for these rows, "dense" where none is faster than `dense`."""
        ways: dict[str, Callable[[Tensor], Tensor]] = {kernel.name: self.packed(kernel.name, x_TI.dtype) for kernel in self.kernels}
        cases = tuple((name, way.case) for name, way in ways.items() if isinstance(way, SparseKernel))
        rows = (len(x_TI) - 1).bit_length()
        key = ("sparse_linear", *self.weight_OI.shape, cases, self.bias_O is None, x_TI.device, x_TI.dtype, torch.get_num_threads(), rows)
        return selection.fastest(key, lambda: {name: partial(way, x_TI) for name, way in (ways | {_DENSE: dense}).items()}, x_TI.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I) by the fastest kernel; densely where a gradient is needed and while torch.compile traces."""
        differentiable = torch.is_grad_enabled() and (x.requires_grad or self.weight_OI.requires_grad)
        if differentiable or torch.compiler.is_compiling() or not x.numel():
            return self._dense(x)
        with torch.no_grad():
            x_TI = x.reshape(-1, x.shape[-1])
            name = self.fastest(x_TI, self._dense)
            y_TO = self._dense(x_TI) if name == _DENSE else self.packed(name, x.dtype)(x_TI)
            return y_TO.view(*x.shape[:-1], -1)

    def _dense(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_OI, self.bias_O)

    def packed(self, name: str, dtype: torch.dtype) -> SparseKernel:
        """Return the kernel of this name for inputs of `dtype`."""
        if (name, dtype) not in self._packed:
            (kernel,) = (kernel for kernel in self.kernels if kernel.name == name)
            self._packed[name, dtype] = kernel(self.weight_OI, self.bias_O, dtype)
        return self._packed[name, dtype]


def product(layers: list[Any], like: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the product of one input with the weights of float linear layers, side by side, where a kernel for zeros was fastest.

    `like` has the rows, the dtype and the device that inputs will have. None where the dense product is faster, or the zeros are few.
    """
    if not all(type(layer) is nn.Linear for layer in layers) or len({layer.bias is None for layer in layers}) > 1:
        return None
    if any(zero_share(layer.weight) < _FEWEST_ZEROS for layer in layers):
        return None
    weight_OI = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    bias_O = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    found = SparseLinear.of(weight_OI, bias_O, like.dtype)
    if found is None:
        return None
    x_TI = torch.randn(len(like), weight_OI.shape[1], device=like.device).to(like.dtype)
    with torch.no_grad():
        name = found.fastest(x_TI, lambda x: torch.cat([layer(x) for layer in layers], dim=-1))
    return None if name == _DENSE else found.packed(name, like.dtype)
