"""KIVI against a literal reference, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.methods.kv_cache.kivi import Kivi
from aerogel.model.calls import Call
from tests.tiny import FAMILIES, LANGUAGE

MATRIX = {"options": {"residual": 4, "group": 4}}


def quantized(x: Tensor, bits: int) -> Tensor:
    """The numbers of one run between its least and largest, number by number, with both in float16."""
    low, high = x.min(), x.max()
    scale = max(float((high - low) / (2**bits - 1)), 2.0**-14)
    step, start = torch.tensor(scale).half().float(), low.half().float()
    return torch.stack([start + step * min(max(round(float((one - start) / step)), 0), 2**bits - 1) for one in x])


def keys_of(x_TD: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """Algorithm 1 of the paper: all but the last T mod residual tokens, channel by channel, so many tokens at a time."""
    whole = len(x_TD) // residual * residual
    found = x_TD.clone()
    for start in range(0, whole, group):
        for channel in range(x_TD.shape[1]):
            found[start : start + group, channel] = quantized(x_TD[start : start + group, channel], bits)
    return found


def values_of(x_TD: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """All but the last `residual` tokens, token by token, so many channels at a time."""
    found = x_TD.clone()
    for token in range(max(0, len(x_TD) - residual)):
        for start in range(0, x_TD.shape[1], group):
            found[token, start : start + group] = quantized(x_TD[token, start : start + group], bits)
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_stores_hold_what_the_paper_says(bits: int) -> None:
    """However the tokens come: a prompt at once, then one by one."""
    torch.manual_seed(0)
    x_TD = torch.randn(23, 8)
    keys, values = Kivi(bits=bits, group=4, residual=8).stores({})  # type: ignore[arg-type]
    for piece in (x_TD[:13], *x_TD[13:].split(1)):
        keys.append(piece[None, None])
        values.append(piece[None, None])
        end = keys.length
        torch.testing.assert_close(keys.read()[0, 0], keys_of(x_TD[:end], bits, 4, 8), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(values.read()[0, 0], values_of(x_TD[:end], bits, 4, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_prompt_attends_to_itself_as_it_is_and_later_tokens_to_what_is_stored(name: str) -> None:
    network, ids = open_model(FAMILIES[name].build()), torch.arange(40).reshape(2, 20)
    prompt, rest = Call((), {"input_ids": ids[:, :16], "use_cache": True}), ids[:, 16:]
    before = network.run(prompt)
    continued = network.run(Call((), {"input_ids": rest, "past_key_values": before.past_key_values, "use_cache": True})).logits
    policy = Kivi(bits=2, group=4, residual=4)
    with policy.on(network, policy.calibrate(network, [prompt])):
        after = network.run(prompt)
        found = network.run(Call((), {"input_ids": rest, "past_key_values": after.past_key_values, "use_cache": True})).logits
    assert torch.equal(after.logits, before.logits)
    apart = float((found - continued).norm() / continued.norm())
    assert 0.01 < apart < 1


def test_options_that_do_not_go_together_are_refused() -> None:
    network = open_model(FAMILIES["llama"].build())
    (problem,) = plan(network, {"steps": [{"kivi": {"group": 32, "residual": 48}}]}, samples=FAMILIES["llama"].calls(1)).problems
    assert "residual is 48, expected a multiple of the group, which is 32" in problem
    with pytest.raises(AerogelError, match="have 16 channels, which its options do not divide"):
        Kivi(group=12, residual=12).calibrate(network, FAMILIES["llama"].calls(1))
