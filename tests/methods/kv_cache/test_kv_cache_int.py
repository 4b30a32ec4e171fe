"""Integer key-value caches: error bounds, decoding of every family, which attentions are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.inference.generate import Generator
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_cache.policy import KVCacheState
from aerogel.model.calls import Call
from aerogel.model.kv_cache import with_cache
from tests.tiny import FAMILIES, LANGUAGE


@pytest.mark.parametrize("name", LANGUAGE)
def test_decoding_reads_the_cache_of_every_family(name: str) -> None:
    """Token by token gives what one forward through the cache gives: a token is rounded alike whenever it comes."""
    network, policy = open_model(FAMILIES[name].build()), KVCacheInt()
    ids = torch.randint(0, 100, (2, 14), generator=torch.Generator().manual_seed(0))
    state = policy.calibrate(network, [Call((), {"input_ids": ids})])
    with policy.on(network, state):
        whole = network.run(Call((), {"input_ids": ids, "use_cache": True})).logits
        answer = network.run(Call((), {"input_ids": ids[:, :9], "use_cache": True}))
        steps = [answer.logits]
        for place in range(9, 14):
            answer = network.run(
                Call((), {"input_ids": ids[:, place : place + 1], "past_key_values": answer.past_key_values, "use_cache": True})
            )
            steps.append(answer.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=2e-3, atol=2e-3)


def test_fewer_bits_are_smaller_and_further_apart() -> None:
    tiny = FAMILIES["llama"]
    network, call = open_model(tiny.build()), with_cache(tiny.calls(1)[0])
    expected = network.run(call).logits
    errors, sizes = [], []
    for bits in (8, 4):
        policy = KVCacheInt(bits=bits)  # type: ignore[arg-type]
        with policy.on(network, policy.calibrate(network, [call])):
            answer = network.run(call)
        errors.append(float((answer.logits - expected).norm() / expected.norm()))
        sizes.append(sum(layer.bytes for layer in answer.past_key_values.layers))
    tokens = 2 * 2 * 2 * call.kwargs["input_ids"].numel()  # layers, heads, keys and values
    assert sizes == [tokens * (16 + 4), tokens * (8 + 4)]
    assert errors[0] < 0.01 < errors[1] < 0.3


@pytest.mark.parametrize("bits", [8, 4])
def test_the_fast_decoder_attends_to_it(bits: Any) -> None:
    """The same tokens as through transformers, from the same kind of cache."""
    network, policy = open_model(FAMILIES["llama"].build()), KVCacheInt(bits=bits)
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with policy.on(network, policy.calibrate(network, [Call((), {"input_ids": ids})])):
        fast = Generator(network, 2, 24).generate(ids, 12)
        slow = Generator(network, 2, 24, fast_decoder=False).generate(ids, 12)
    assert (fast.path, slow.path) == ("fast_decoder", "transformers")
    assert torch.equal(fast.tokens, slow.tokens)


def test_transformers_generates_with_it() -> None:
    """Beams are reordered in the stores; greedy tokens are those of the generator."""
    network, policy = open_model(FAMILIES["llama"].build()), KVCacheInt()
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    module: Any = network.module
    with policy.on(network, policy.calibrate(network, [Call((), {"input_ids": ids})])):
        greedy = module.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        ours = Generator(network, 2, 24).generate(ids, 6).tokens
        beams = module.generate(ids, max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
        static = pytest.raises(AerogelError, match="StaticLayer, and only a DynamicCache is quantized")
        with static:
            module.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(greedy[:, 9:], ours)
    assert beams.shape == (2, 15)


def test_what_loses_most_is_kept() -> None:
    """The loss of an attention is the KL divergence with its cache alone in 4 bits, a mean over tokens."""
    tiny = FAMILIES["llama"]
    network, calls = open_model(tiny.build()), tiny.calls(2)
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    expected, tokens = dict.fromkeys(names, 0.0), 0
    for call in map(with_cache, calls):
        p = network.run(call).logits.double().log_softmax(-1)
        tokens += p.shape[0] * p.shape[1]
        for name in names:
            with KVCacheInt(bits=4).on(network, KVCacheState((name,))):
                q = network.run(call).logits.double().log_softmax(-1)
            expected[name] += float((p.exp() * (p - q)).sum())
    state = KVCacheInt(bits=4, keep=1).calibrate(network, calls)
    assert state.kept == (max(expected, key=expected.__getitem__),)
    assert set(state.attentions + state.kept) == set(names)
    losses = dict(zip(state.attentions + state.kept, state.losses, strict=True))
    assert losses == pytest.approx({name: total / tokens for name, total in expected.items()}, rel=1e-3)
    with KVCacheInt(bits=4, keep=1).on(network, state):
        layers = network.run(with_cache(calls[0])).past_key_values.layers
    assert [hasattr(layer, "bytes") for layer in layers] == [name in state.attentions for name in names]
    with pytest.raises(AerogelError, match="2 attentions have a cache, 0 are ignored and 2 are to be kept"):
        KVCacheInt(keep=2).calibrate(network, calls)


def test_ignored_attentions_stay() -> None:
    tiny = FAMILIES["llama"]
    state = KVCacheInt(ignore=("*.layers.0.*",)).calibrate(open_model(tiny.build()), tiny.calls(1))
    assert state.attentions == ("model.layers.1.self_attn",)
