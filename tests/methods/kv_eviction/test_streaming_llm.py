"""StreamingLLM: a prompt, chunks of it and single tokens see the same, and the cache stays as large as the window."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from aerogel.errors import AerogelError
from aerogel.evaluate.decode_perplexity import DecodePerplexity
from aerogel.inference.generate import Generator
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_eviction.snapkv import Snapkv
from aerogel.methods.kv_eviction.streaming_llm import StreamingLlm
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.methods.prompt_tokens.prompts import LENGTH, deep, prompt

MATRIX = {"options": {"window": 9, "sink": 2}, "bound": 0.9}
POLICY = StreamingLlm(window=20, sink=3)


def state(network: Network) -> Any:
    return POLICY.calibrate(network, [prompt(1, 32)])


def literal(network: Network, ids_BN: Tensor, pads: int = 0) -> Tensor:
    """Logits of one forward under a mask that is written out."""
    rows, length = ids_BN.shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        first = pads if row == rows - 1 else 0
        for query in range(length):
            for key in range(query + 1):
                mask[row, 0, query, key] = key == query or (key >= first and (key < first + 3 or key > query - 17))
    return network.run(Call((), {"input_ids": ids_BN, "attention_mask": mask, "use_cache": False})).logits


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("pads", [0, 7, LENGTH - 5])
def test_a_forward_equals_a_mask_that_is_written_out(use_cache: bool, pads: int) -> None:
    network = deep()
    call = Call((), prompt(2, pads=pads).kwargs | {"use_cache": use_cache})
    with POLICY.on(network, state(network)):
        ours = network.run(call)
    real_BN = call.kwargs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real_BN], literal(network, call.kwargs["input_ids"], pads)[real_BN], rtol=0, atol=1e-5)
    if use_cache:
        assert {layer.keys.shape[2] for layer in ours.past_key_values.layers} == {20}
        assert {layer.get_seq_length() for layer in ours.past_key_values.layers} == {LENGTH}


@pytest.mark.parametrize("parts", [1, 7, 33])
@pytest.mark.parametrize("pads", [0, 7])
def test_parts_of_a_text_see_what_one_forward_sees(parts: int, pads: int) -> None:
    """Token by token, in chunks shorter than the window, and longer; lengths and first tokens stay once the window is full."""
    network = deep("Qwen3")
    call = prompt(2, 70, pads=pads)
    ids_BN, mask_BN = (call.kwargs[name] for name in ("input_ids", "attention_mask"))
    cache, found, sinks = DynamicCache(config=network.config), [], None
    with POLICY.on(network, state(network)):
        for start in range(0, 70, parts):
            end = min(start + parts, 70)
            given = {"input_ids": ids_BN[:, start:end], "attention_mask": mask_BN[:, :end], "past_key_values": cache}
            found.append(network.run(Call((), given)).logits)
            held = cache.layers[3].keys
            assert held.shape[2] == min(end, 20)
            if end >= 20 and not pads:
                sinks = held[:, :, :3] if sinks is None else sinks
                assert torch.equal(held[:, :, :3], sinks)
    read_BN = mask_BN.bool()
    torch.testing.assert_close(torch.cat(found, 1)[read_BN], literal(network, ids_BN, pads)[read_BN], rtol=0, atol=1e-5)


def test_before_the_window_is_full_everything_is_dense_bit_for_bit() -> None:
    network = deep()
    call = Call((), prompt(2, 20, pads=3).kwargs | {"use_cache": True})
    dense = network.run(call)
    with POLICY.on(network, state(network)):
        ours = network.run(call)
    assert torch.equal(ours.logits, dense.logits)
    assert all(
        torch.equal(one.keys, other.keys) for one, other in zip(ours.past_key_values.layers, dense.past_key_values.layers, strict=True)
    )


def test_generation_is_that_of_the_mask_and_not_of_the_fast_decoder() -> None:
    """Its window moves with every token, which the fast decoder does not know."""
    network = deep()
    ids_BN = prompt().kwargs["input_ids"]
    with POLICY.on(network, state(network)):
        made = Generator(network, 1, LENGTH + 6).generate(ids_BN, 6)
    assert made.path == "transformers"
    assert "hangs on its forward" in str(made.reason)
    logits_NV = literal(network, torch.cat([ids_BN, made.tokens], 1))[0]
    assert logits_NV[LENGTH - 1 : -1].argmax(-1).tolist() == made.tokens[0].tolist()


def test_its_perplexity_by_decoding_is_taken_unasked() -> None:
    network = deep()
    assert not DecodePerplexity.is_usual(network)
    with POLICY.on(network, state(network)):
        assert DecodePerplexity.is_usual(network)


def test_calibration_says_what_it_costs() -> None:
    network = deep()
    found = state(network)
    assert found.tokens == 15
    assert found.kl > 0


@pytest.mark.parametrize("first", [KVCacheInt(bits=8), Snapkv(keep=32, window=4)])
def test_what_holds_the_cache_otherwise_is_refused(first: Any) -> None:
    network = deep()
    call = Call((), prompt().kwargs | {"use_cache": True})
    ours = state(network)
    message = "from a dynamic cache in 16 bits only" if isinstance(first, KVCacheInt) else "is on already; leave one of them out"
    with (
        first.on(network, first.calibrate(network, [call])),
        pytest.raises(AerogelError, match=re.escape(message)),
        POLICY.on(network, ours),
    ):
        network.run(call)


def test_more_sinks_than_the_window_holds_are_refused() -> None:
    assert list(StreamingLlm(window=4).problems(deep(), None)) == ["sink is 4, expected less than window, which is 4"]  # type: ignore[arg-type]
