"""Blocks computed again for the backward pass: the same gradients, less that is kept, and cache entries that notice nothing."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from aerogel.engine.opening import open_model
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.checkpointing import checkpointing_blocks
from aerogel.runtime.feature_cache.controlled import CacheContents, ControlledDenoiser, controlled
from tests.runtime.feature_cache.test_schedule import NAMES, calls
from tests.tiny import opened


def scores_of(network: Network) -> Tensor:
    """Some above the threshold, some below."""
    return torch.linspace(0.05, 0.9, len(cached_modules_of(network))).flip(0).requires_grad_()


def forward(network: Network, denoiser: ControlledDenoiser, name: str, scores_N: Tensor) -> tuple[Tensor, CacheContents]:
    """A step with scores behind one that computes everything."""
    first, second = calls(name)[:2]
    with torch.no_grad():
        _, held = denoiser.step(first, [True] * len(scores_N), denoiser.empty)
    made, after = denoiser.step(second, scores_N, held, 0.3)
    return made.sample, after


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_the_same(name: str) -> None:
    network = opened(name)
    with controlled(network) as denoiser:
        scores_N = scores_of(network)
        wanted, kept = forward(network, denoiser, name, scores_N)
        (gradient_N,) = torch.autograd.grad(wanted.square().mean(), scores_N)
        with checkpointing_blocks(denoiser):
            made, after = forward(network, denoiser, name, scores_N)
            (again_N,) = torch.autograd.grad(made.square().mean(), scores_N)
    assert (gradient_N != 0).all()
    assert torch.equal(made, wanted)
    assert all(map(torch.equal, _flat(after), _flat(kept)))
    torch.testing.assert_close(again_N, gradient_N, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_slots_notice_nothing_and_nothing_is_read_of_them(name: str) -> None:
    """What a later forward did to the cache entries is not seen when blocks are computed again, and is there still afterwards."""
    network = opened(name)
    with controlled(network) as denoiser, checkpointing_blocks(denoiser):
        scores_N = scores_of(network)
        made, _ = forward(network, denoiser, name, scores_N)
        (wanted_N,) = torch.autograd.grad(made.square().mean(), scores_N)
        made, after = forward(network, denoiser, name, scores_N)
        with torch.no_grad():
            denoiser.step(calls(name)[2], [False] * len(scores_N), after)
        entries = list(denoiser.entries.values())
        for entry in entries:
            entry.value = torch.full((1,), torch.nan)
        before = [dict(vars(entry)) for entry in entries]
        (gradient_N,) = torch.autograd.grad(made.square().mean(), scores_N)
        assert [dict(vars(entry)) for entry in entries] == before, "compared by identity: these are the very tensors"
    assert torch.equal(gradient_N, wanted_N)


def saved_bytes(layers: int, *, again: bool) -> int:
    """Of what a step with scores keeps for the backward pass, its weights and what the cache entries hold aside."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers, sample_size=8, patch_size=2,
        norm_num_groups=4,
    ).eval()  # fmt: skip
    network, seen = open_model(transformer), dict[int, Tensor]()

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x
        return x

    with controlled(network) as denoiser:
        given = calls("dit")[:2]
        with torch.no_grad():
            _, held = denoiser.step(given[0], [True] * 2 * layers, denoiser.empty)
        scores_N = torch.full((2 * layers,), 0.5, requires_grad=True)
        with checkpointing_blocks(denoiser) if again else torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
            made = denoiser.step(given[1], scores_N, held, 0.1)[0].sample
    assert made.requires_grad
    known = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *held)}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in known)


def test_a_block_more_keeps_what_goes_into_it_and_no_more() -> None:
    growth = {again: (saved_bytes(6, again=again) - saved_bytes(2, again=again)) / 4 for again in (False, True)}
    samples, tokens, width, size = 2, 16, 16, 4
    assert growth[True] == samples * tokens * width * size
    assert growth[False] > 10 * growth[True]


def test_what_goes_on_comes_off() -> None:
    network = opened("dit")
    with controlled(network) as denoiser:
        blocks = list(network.blocks().values())
        with checkpointing_blocks(denoiser):
            assert all("forward" in vars(block) for block in blocks)
        assert not any("forward" in vars(block) for block in blocks)


def _flat(held: CacheContents) -> list[Any]:
    return [tensor for kept in held for tensor in (kept if isinstance(kept, tuple) else (kept,))]
