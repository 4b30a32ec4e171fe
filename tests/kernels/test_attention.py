"""Attention by integers against a literal formula in float64, where it is taken and where not, and the gradients of its rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels import attention, synchronized_clock
from aerogel.kernels.attention import Operands, by_integers, rounded, run, takes
from aerogel.numerics.quantize import Grid
from tests.clocks import Manual
from tests.kernels.exact_sums import needs_exact_sums


def operands(bits: int = 8, most: int = 255) -> Operands:
    """Grids of different sizes, each with a zero point of its own."""
    spans = {"query": (6.0, 5), "key": (8.0, -9), "value": (7.0, 17)}
    grids = {
        name: Grid(torch.tensor(span / (2**bits - 1)), torch.tensor(zero // 2 ** (8 - bits), dtype=torch.int8))
        for name, (span, zero) in spans.items()
    }
    return Operands(grids, bits, torch.tensor(0.7 / most), most)


def made(queries: int, keys: int, channels: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (2, 3, L or S, D), laid out as modules lay them out."""
    generator = torch.Generator().manual_seed(queries + keys)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, count, 3, channels, generator=generator).to(dtype).transpose(1, 2) for count in (queries, keys, keys)
    )


def literal(q: Tensor, k: Tensor, v: Tensor, given: Operands, scale: float | None = None) -> Tensor:
    low, high = -(2 ** (given.bits - 1)), 2 ** (given.bits - 1) - 1

    def affine(x: Tensor, name: str) -> Tensor:
        step, zero = given.grids[name].scale, given.grids[name].zero
        assert zero is not None
        return ((x.float() / step + zero).clamp(low, high).round() - zero).double() * step.double()

    scores = affine(q, "query") @ affine(k, "key").mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    codes = (scores.softmax(-1) / given.step.double()).round().clamp(0, given.most)
    return codes * given.step.double() @ affine(v, "value")


@needs_exact_sums
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (300, 77), (5, 4000)])
@pytest.mark.parametrize("given", [operands(), operands(4), operands(8, 15)], ids=["8 bits", "4 bits", "probabilities of 4 bits"])
def test_integers_give_what_the_formula_says(queries: int, keys: int, given: Operands) -> None:
    tensors = made(queries, keys)
    made_BHLD, wanted = by_integers(*tensors, None, given).double(), literal(*tensors, given)
    # A probability that lies on a tie may take the neighbouring code; few do.
    off = (made_BHLD - wanted).abs()
    assert float(off.max()) <= 3 * float(given.step) * float(tensors[2].abs().max())
    assert float(off.mean()) < 0.002 * float(wanted.abs().mean())


def test_scores_are_made_in_pieces_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = made(70, 64)
    whole = by_integers(*tensors, 0.3, operands())
    monkeypatch.setattr(attention, "CHUNK_SCORES", 64 * 9)
    # Products of other sizes may add in another order: the last bit of a float, no more.
    torch.testing.assert_close(by_integers(*tensors, 0.3, operands()), whole, rtol=0, atol=1e-6)
    assert float((whole.double() - literal(*tensors, operands(), 0.3)).abs().mean()) < 1e-4


def test_the_result_has_the_dtype_of_the_query_and_joins_heads_without_a_copy() -> None:
    result = by_integers(*made(32, 32, dtype=torch.bfloat16), None, operands())
    assert result.dtype == torch.bfloat16
    assert result.transpose(1, 2).is_contiguous()


@needs_exact_sums
@pytest.mark.usefixtures("kernels_by_time")
@pytest.mark.parametrize("integers_win", [True, False])
def test_the_faster_of_both_is_kept(monkeypatch: pytest.MonkeyPatch, integers_win: bool) -> None:
    tensors, given = made(24, 40), operands()
    clock, tried = Manual(), list[str]()

    def slowed(name: str, own: Callable[..., Tensor], seconds: float, *args: Any, **kwargs: Any) -> Tensor:
        clock.seconds += seconds
        tried.append(name)
        return own(*args, **kwargs)

    monkeypatch.setattr(synchronized_clock, "host_clock", clock)
    monkeypatch.setattr(attention, "by_integers", partial(slowed, "integers", by_integers, 1.5))
    monkeypatch.setattr(attention, "attention", partial(slowed, "reference", attention.attention, 2.0 if integers_win else 1.0))
    first, second = (run(*tensors, operands=given, attn_mask=None, dropout_p=0.0, is_causal=False) for _ in range(2))
    assert tried == ["integers"] * 4 + ["reference"] * 4 + ["integers" if integers_win else "reference"] * 2
    assert torch.equal(first, second)
    assert torch.equal(first, by_integers(*tensors, None, given)) is integers_win
    assert float((first.double() - literal(*tensors, given)).abs().mean()) < 1e-3


@needs_exact_sums
def test_what_integers_cannot_do_is_left_to_floats() -> None:
    q, k, v = made(8, 8)
    able = partial(takes, q, k, v, ())
    assert able({"scale": 0.5, "attn_mask": None, "is_causal": False}, operands())
    for refused in ({"attn_mask": torch.zeros(8, 8)}, {"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}):
        assert not able(refused, operands())
    assert not able({}, operands(8, 65535))
    assert not takes(q, k[:, :1], v[:, :1], (), {}, operands())
    assert not takes(q.double(), k.double(), v.double(), (), {}, operands())
    assert not takes(q.requires_grad_(), k, v, (), {}, operands())
    with torch.no_grad():
        assert takes(q, k, v, (), {}, operands())


def test_a_step_size_that_is_learned_gets_its_gradient() -> None:
    given = operands()
    scale = given.grids["key"].scale.requires_grad_()
    run(*made(8, 8), operands=given).square().sum().backward()
    assert scale.grad is not None
    assert float(scale.grad) != 0


def test_gradients_pass_through() -> None:
    x = torch.tensor([0.1, 0.52, 3.0], requires_grad=True)
    y = rounded(x, torch.tensor(0.25), 4)
    assert y.tolist() == [0.0, 0.5, 1.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


def test_the_gradient_of_a_step_size_is_that_of_lsq() -> None:
    """Rounding error inside of the grid, its largest code outside (arXiv:1902.08153, equation 3)."""
    x, step = torch.tensor([0.1, 0.52, 3.0]), torch.tensor(0.25, requires_grad=True)
    for value, wanted in zip(x, (0 - 0.4, 2 - 2.08, 4.0), strict=True):
        (gradient,) = torch.autograd.grad(rounded(value, step, 4), step)
        assert float(gradient) == pytest.approx(wanted, abs=1e-5)
