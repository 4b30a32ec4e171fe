"""Kernels that leave zeros out against the dense product in float64, what they accept, and the choice between the two."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.kernels import selection, sparse_linear
from aerogel.kernels.sparse_linear import Blocks, SemiStructured, SparseLinear, product


def blocky(rows: int, columns: int, side: int, share: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight of so many blocks of which about this share is zero."""
    generator = torch.Generator().manual_seed(seed)
    kept_RC = torch.rand(rows, columns, generator=generator) >= share
    mask_OI = kept_RC.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (torch.randn(mask_OI.shape, generator=generator) * mask_OI).to(dtype)


def pick(monkeypatch: pytest.MonkeyPatch, name: str) -> list[list[str]]:
    """Make one kernel the fastest wherever there is a choice; returns the names of each choice."""
    asked: list[list[str]] = []

    def chosen(key: object, implementations: object, device: object) -> str:
        asked.append(list(implementations()))  # type: ignore[operator]
        return name if name in asked[-1] else asked[-1][-1]

    monkeypatch.setattr(selection, "fastest", chosen)
    return asked


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    side=st.sampled_from((8, 16, 32)),
    share=st.sampled_from((0.3, 0.6, 0.9)),
    tokens=st.sampled_from((1, 2, 7)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_dense_product(
    rows: int, columns: int, side: int, share: float, tokens: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    weight = blocky(rows, columns, side, share, seed, dtype)
    if not Blocks.accepts(weight, dtype):
        assert not (weight == 0).any() or bool((weight == 0).float().mean() < 0.02)
        return
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns * side, generator=generator).to(dtype)
    bias_O = torch.randn(rows * side, generator=generator).to(dtype) if bias else None
    y = Blocks(weight, bias_O, dtype)(x)
    wanted = x.double() @ weight.double().T + (0 if bias_O is None else bias_O.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


def test_only_kept_blocks_are_stored() -> None:
    weight = torch.zeros(96, 128)
    weight[:32, 32:64] = weight[32:64, :32] = weight[32:64, 96:] = 1
    kernel = Blocks(weight, None, torch.float32)
    assert kernel.blocks.shape == (3, 2 * 32, 32)  # three rows of blocks, filled up to two
    assert torch.equal(kernel(torch.eye(128)), weight.T)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(64, 64),  # no zeros
        torch.randn(64, 64) * (torch.rand(64, 64) < 0.5),  # zeros anywhere
        torch.randn(64, 64) * torch.tensor([1, 1, 0, 0]).repeat(16),  # 2:4
        blocky(8, 8, 8, 0.1),  # few zeros
        blocky(2, 3, 20, 0.6),  # sides that no block divides
        torch.zeros(4, 8, 8),
    ],
)
def test_other_zeros_are_left_to_the_dense_product(weight: Tensor) -> None:
    assert SparseLinear.of(weight, None, torch.float32) is None


def test_the_fastest_of_blocks_and_the_dense_product_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 96, bias=False).requires_grad_(False)
    layer.weight.copy_(blocky(3, 2, 32, 0.5, seed=1))
    x = torch.randn(1, 64)
    asked = pick(monkeypatch, "blocks")
    found = product([layer], x)
    assert isinstance(found, Blocks)
    torch.testing.assert_close(found(x), layer(x))
    assert asked == [["blocks", "dense"]]
    pick(monkeypatch, "dense")
    assert product([layer], x) is None


@pytest.mark.usefixtures("kernels_by_time")
def test_the_choice_is_measured_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def timed(run: object, device: object) -> float:
        taken.append(type(getattr(run, "func", run)).__name__)
        return float(len(taken))

    monkeypatch.setattr(selection, "timed", timed)
    sparse = SparseLinear.of(blocky(2, 2, 32, 0.5, seed=1), None, torch.float32)
    assert sparse is not None
    with torch.no_grad():
        for rows in (1, 1, 3, 4):
            sparse(torch.randn(rows, 64))
    assert len(taken) == 4  # two ways for one row, two for three and four


def test_layers_that_share_an_input_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, 32 * count).requires_grad_(False) for count in (3, 1)]
    for number, layer in enumerate(layers):
        layer.weight.copy_(blocky(len(layer.weight) // 32, 2, 32, 0.5, seed=number + 1))
    pick(monkeypatch, "blocks")
    x = torch.randn(2, 64)
    found = product(layers, x)
    assert found is not None
    torch.testing.assert_close(found(x), torch.cat([layer(x) for layer in layers], dim=-1))
    dense = nn.Linear(64, 32).requires_grad_(False)
    assert product([layers[0], dense], x) is None
    assert product([layers[0], nn.Identity()], x) is None


def test_gradients_take_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pick(monkeypatch, "blocks")
    weight = blocky(2, 2, 32, 0.5, seed=1)
    sparse = SparseLinear.of(weight, None, torch.float32)
    assert sparse is not None
    x = torch.randn(3, 64, requires_grad=True)
    sparse(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight.sum(0).expand(3, -1)) or torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-5)
    assert asked == []


def test_packed_weights_go_with_their_owner() -> None:
    sparse = SparseLinear.of(blocky(2, 2, 32, 0.5, seed=1), None, torch.float32)
    assert sparse is not None
    packed = weakref.ref(sparse.packed("blocks", torch.float32))
    del sparse
    gc.collect()
    assert packed() is None


def test_semi_structured_products_need_a_gpu() -> None:
    weight = torch.randn(64, 64).bfloat16() * torch.tensor([1, 0, 0, 1]).repeat(16)
    assert not SemiStructured.accepts(weight, torch.bfloat16)
    assert SemiStructured in sparse_linear.KERNELS


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="2:4 products need CUDA, compute capability 8.0",
)
@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_products_on_a_gpu(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(128, 96, device="cuda", dtype=dtype).requires_grad_(False)
    layer.weight.mul_(torch.tensor([1, 0, 0, 1], device="cuda").repeat(32))
    pick(monkeypatch, "semi_structured")
    x = torch.randn(rows, 128, device="cuda", dtype=dtype)
    found = product([layer], x)
    assert isinstance(found, SemiStructured)
    torch.testing.assert_close(found(x).float(), layer(x).float(), rtol=1e-2, atol=1e-2)
    layer.weight[0, :4] = 1
    assert product([layer], x) is None
