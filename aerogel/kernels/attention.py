"""Attention with quantized operands: by integers in oneDNN where that is possible and was faster when it was tried, else in float32.

B batch, H heads, L queries, S keys, D channels of a head. Between the two products, and in the softmax, everything is float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels import affine, selection
from aerogel.numerics.attention import attention
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import Grid, fake_quantize
from aerogel.numerics.scheme import PerTensor, TensorScheme

CHUNK_SCORES = 2**19
"""Scores that are computed at once: they and their integer codes stay in the cache."""
_KEYS = 2**16
"""The most keys whose sum of products of integer codes fits into 32 bits."""
_FLOATS = (torch.float32, torch.bfloat16)


class Operands(NamedTuple):
    """Quantization of the operands of an attention."""

    grids: dict[str, Grid]
    """Scale and zero point of query, key and value."""
    bits: int
    """Bits of these, at most 8."""
    step: Tensor
    """Distance between the integer codes of probabilities; the first is zero."""
    most: int
    """The highest code of a probability."""

    @property
    def scheme(self) -> TensorScheme:
        """The format of query, key and value."""
        return scheme_of(self.bits)

    def fake(self, operand: str, x: Tensor) -> Tensor:
        """The operand's nearest values, with straight-through gradients."""
        if operand == "probabilities":
            return rounded(x, self.step, self.most)
        return fake_quantize(x, self.grids[operand], self.scheme)

    def codes(self, operand: str, x: Tensor) -> Tensor:
        """The operand's int8 codes, each head in one piece."""
        return affine.codes(x, self.grids[operand], self.scheme.format).contiguous()

    def zero(self, operand: str) -> int:
        """The code that stands for 0.0."""
        zero = self.grids[operand].zero
        assert zero is not None, "the scheme is asymmetric"
        return int(zero)


def scheme_of(bits: int) -> TensorScheme:
    """One scale and one zero point for the whole tensor."""
    return TensorScheme(format_named(f"int{bits}"), PerTensor(), symmetric=False)


def rounded(x: Tensor, step: Tensor, most: int) -> Tensor:
    """Return x on the grid 0, step, ..., most * step; gradients are straight-through for x and those of LSQ for the step."""
    steps = (x / step).clamp(max=most)
    return (torch.round(steps).detach() + (steps - steps.detach())) * step


def run(query: Tensor, key: Tensor, value: Tensor, *args: Any, operands: Operands, **kwargs: Any) -> Tensor:
    """Return attention (B, H, L, D) in the query's dtype; the other arguments are those of torch's scaled_dot_product_attention."""
    written_out = partial(attention, query, key, value, *args, **kwargs, change=operands.fake)
    if not takes(query, key, value, args, kwargs, operands):
        return written_out()
    integers = partial(by_integers, query, key, value, kwargs.get("scale"), operands)
    ways = {"integers": integers, "reference": written_out}
    case = ("attention", query.shape, key.shape, query.dtype, torch.get_num_threads())
    with torch.no_grad():
        return ways[selection.fastest(case, lambda: ways, query.device)]()


def takes(query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Operands) -> bool:
    """Return True if integers can replace the float32 arithmetic: on a CPU, without gradients, masks, dropout or keys shared by heads."""
    learned = (query, key, value, operands.step, *(grid.scale for grid in operands.grids.values()))
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in learned)):
        return False
    plain = not args and kwargs.get("attn_mask") is None and not any(kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2] and query.shape[-1] == value.shape[-1]
    small = operands.most <= 255 and key.shape[-2] <= _KEYS and min(query.numel(), key.numel()) > 0
    return plain and alike and small and query.device.type == "cpu" and query.dtype in _FLOATS and affine.exact()


def by_integers(query: Tensor, key: Tensor, value: Tensor, scale: float | None, operands: Operands) -> Tensor:
    """Multiply integer codes; sums are exact, so only float32's own rounding differs from the reference.

    The zero point of the key adds the same to all scores of a query, which a softmax does not see; that of the value is subtracted by
    the sum of the probabilities' codes.
    """
    query_BHLD = affine.unsigned(operands.codes("query", query))
    key_BHSD, value_BHDS = operands.codes("key", key), operands.codes("value", value.transpose(-2, -1))
    # In memory (B, L, H, D): who joins the heads afterwards needs no copy.
    made_BHLD = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for image in range(query.shape[0]):
        for head in range(query.shape[1]):
            at = (image, head)
            _head(query_BHLD[at], key_BHSD[at], value_BHDS[at], made_BHLD[at], scale, operands)
    return made_BHLD


def _head(query_LD: Tensor, key_SD: Tensor, value_DS: Tensor, made_LD: Tensor, scale: float, operands: Operands) -> None:
    """Fill in what one head gives, some queries at a time."""
    scales, keys = {name: float(grid.scale) for name, grid in operands.grids.items()}, len(key_SD)
    rows, step, zero = max(1, CHUNK_SCORES // keys), float(operands.step), operands.zero("value")
    first = _Product(key_SD, rows, scales["key"] * scale, scales["query"], operands.zero("query") + 128)
    second = _Product(value_DS, rows, scales["value"], step, 0)
    buffer_LS = torch.empty(min(rows, len(query_LD)), keys)
    for some_LD, given_LD in zip(query_LD.split(rows), made_LD.split(rows), strict=True):
        probabilities_LS = torch.softmax(first(some_LD), -1, out=buffer_LS[: len(some_LD)])
        codes_LS = probabilities_LS.div_(operands.step).clamp_(max=operands.most).round_()
        extra_L1 = codes_LS.sum(-1, keepdim=True) * (zero * step * scales["value"])
        given_LD.copy_(second(affine.unsigned(codes_LS.sub_(128).to(torch.int8))).sub_(extra_L1))


class _Product:
    """Unsigned rows times a signed matrix under one scale each, float32."""

    def __init__(self, codes_OI: Tensor, rows: int, scale: float, input_scale: float, input_zero: int) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(codes_OI, [rows, codes_OI.shape[1]])
        self._input = (input_scale, input_zero)
        self._scale = (torch.full((len(codes_OI),), scale), torch.zeros(len(codes_OI), dtype=torch.int32))

    def __call__(self, codes_TI: Tensor) -> Tensor:
        rest: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        made: Tensor = torch.ops.onednn.qlinear_pointwise(codes_TI, *self._input, self._packed, *self._scale, *rest)
        return made
