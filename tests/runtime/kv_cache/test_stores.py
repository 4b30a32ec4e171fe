"""Stores of keys and values: numbers against literal formulas, lengths, rows, products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.numerics import kv_cache as numerics
from aerogel.runtime.kv_cache.layer import QuantizedCacheLayer
from aerogel.runtime.kv_cache.stores import PIECE, ChannelStore, Fp8Store, RecentStore, Store, TokenStore

MAKE: dict[str, Callable[[], Store]] = {
    "int8": lambda: TokenStore(8),
    "int4": lambda: TokenStore(4),
    "int4 groups": lambda: TokenStore(4, 4),
    "fp8": lambda: Fp8Store(torch.tensor([0.01])),
    "kivi keys": lambda: RecentStore(ChannelStore(4, 4), lambda recent: recent // 8 * 8),
    "kivi values": lambda: RecentStore(TokenStore(4, 4), lambda recent: max(0, recent - 8)),
}


@settings(deadline=None, max_examples=50)
@given(
    numbers=st.lists(st.floats(-60000, 60000, width=32), min_size=8, max_size=8),
    bits=st.sampled_from([2, 4, 8]),
)
def test_codes_are_the_nearest_of_a_grid_between_the_ends(numbers: list[float], bits: int) -> None:
    x = torch.tensor(numbers)[None]
    codes, found = numerics.encode(x, bits, dim=-1)
    grid = found.low.float() + found.scale.float() * torch.arange(2**bits)
    nearest = (x[:, :, None] - grid[:, None]).abs().amin(-1)
    back = numerics.decode(codes, found, torch.float32)
    torch.testing.assert_close((back - x).abs(), nearest, rtol=1e-5, atol=1e-2)
    assert back.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 1000), channels=st.sampled_from([4, 8, 64]))
def test_packed_channels_come_back(bits: int, seed: int, channels: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, 5, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = numerics.pack_channels(codes, bits)
    assert packed.shape == (2, 3, 5, channels * bits // 8)
    assert torch.equal(numerics.unpack_channels(packed, bits), codes)


def test_float8_is_read_as_torch_reads_it() -> None:
    """Every code but the two that are no numbers."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (torch.tensor([1.0]), torch.tensor([0.3])):
        assert torch.equal(numerics.decode_fp8(codes, scale, torch.float32), codes.float() * scale)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_however_tokens_come_the_store_holds_the_same(name: str) -> None:
    """All at once, one by one, in runs; and each is near what it was."""
    x_BHTD = torch.randn(2, 3, 37, 8, generator=torch.Generator().manual_seed(0))
    whole, single, runs = MAKE[name](), MAKE[name](), MAKE[name]()
    whole.append(x_BHTD)
    for token in x_BHTD.split(1, dim=2):
        single.append(token)
    for run in x_BHTD.split(5, dim=2):
        runs.append(run)
    assert whole.length == single.length == runs.length == 37
    assert torch.equal(whole.read(), single.read())
    assert torch.equal(whole.read(), runs.read())
    assert torch.equal(whole.read(11), whole.read()[:, :, 11:])
    assert float((whole.read() - x_BHTD).norm() / x_BHTD.norm()) < 0.1


@pytest.mark.parametrize("name", sorted(MAKE))
def test_products_are_those_with_what_is_read(name: str) -> None:
    """Also where they go piece by piece."""
    store = MAKE[name]()
    generator = torch.Generator().manual_seed(0)
    store.append(torch.randn(1, 2, PIECE + 300, 8, generator=generator))
    query = torch.randn(1, 2, 3, 8, generator=generator)
    scores = store.scores(query)
    torch.testing.assert_close(scores, query @ store.read().mT)
    torch.testing.assert_close(store.mixed(scores.softmax(-1)), scores.softmax(-1) @ store.read())


@pytest.mark.parametrize("name", sorted(MAKE))
def test_products_in_bfloat16_are_as_near_as_those_of_its_numbers(name: str) -> None:
    """Ranges far from zero: what is added for them must not drown the rest."""
    generator, store = torch.Generator().manual_seed(0), MAKE[name]()
    x_BHTD = torch.randn(1, 2, 300, 8, generator=generator) * 0.1 + 0.7
    query = torch.randn(1, 2, 3, 8, generator=generator)
    store.append(x_BHTD.bfloat16())
    exact = query.bfloat16().double() @ store.read().double().mT
    assert float((store.scores(query.bfloat16()).double() - exact).norm() / exact.norm()) < 0.01
    chances = exact.softmax(-1)
    mixed = chances.bfloat16().double() @ store.read().double()
    assert float((store.mixed(chances.bfloat16()).double() - mixed).norm() / mixed.norm()) < 0.01


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("length", [36, 30, 17, 8, 3, 0])
def test_a_cropped_store_goes_on(name: str, length: int) -> None:
    x_BHTD = torch.randn(1, 2, 37, 8, generator=torch.Generator().manual_seed(0))
    store = MAKE[name]()
    store.append(x_BHTD)
    before = store.read()
    store.crop(length)
    assert store.length == length
    if length:
        assert torch.equal(store.read(), before[:, :, :length])
    store.append(x_BHTD[:, :, length:])
    assert store.length == 37
    assert float((store.read() - x_BHTD).norm() / x_BHTD.norm()) < 0.12


@pytest.mark.parametrize("name", sorted(MAKE))
def test_rows_follow_beams(name: str) -> None:
    layer = QuantizedCacheLayer(lambda: (MAKE[name](), MAKE[name]()))
    x_BHTD = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    layer.update(x_BHTD, 2 * x_BHTD)
    before = layer.stored_keys.read()
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.stored_keys.read(), before[[2, 2, 0]])
    layer.batch_select_indices(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert len(layer.stored_values.read()) == 2
    assert torch.equal(layer.stored_keys.read(), before[[2, 2]])
    layer.crop(-5)
    assert layer.get_seq_length() == 15
    layer.reset()
    assert layer.get_seq_length() == 0


def test_a_window_bounds_what_is_read() -> None:
    """As the sliding layer of transformers answers."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    ours, theirs = QuantizedCacheLayer(lambda: (Exact(), Exact()), window=6), DynamicSlidingWindowLayer(sliding_window=6)
    x_BHTD = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    for piece in x_BHTD.split([3, 4, 1, 1, 7, 1, 3], dim=2):
        assert ours.get_mask_sizes(piece.shape[2]) == theirs.get_mask_sizes(piece.shape[2])
        for mine, other in zip(ours.update(piece, piece), theirs.update(piece, piece), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()


class Exact(RecentStore):
    """A store that quantizes nothing."""

    def __init__(self) -> None:
        super().__init__(TokenStore(8), lambda recent: 0)


def test_buffers_keep_what_was_appended() -> None:
    store = Exact()
    x_BHTD = torch.randn(1, 1, 1500, 4)
    for piece in x_BHTD.split([1, 255, 1, 700, 543], dim=2):
        store.append(piece)
    assert torch.equal(store.read(), x_BHTD)
    assert store.bytes == x_BHTD.nbytes
