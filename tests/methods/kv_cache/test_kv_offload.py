"""Offloading: the order of copies, what is on the device at once, and the same bits as with everything there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from aerogel.errors import AerogelError
from aerogel.inference.generate import Generator
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_cache.kv_offload import KvOffload
from aerogel.methods.kv_eviction.snapkv import Snapkv
from aerogel.methods.kv_eviction.streaming_llm import StreamingLlm
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.kv_cache.offloading import Event, Offloading
from aerogel.runtime.tokens.decoder import decoder_of
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, deep, prompt

MATRIX: dict[str, Any] = {"options": {}}
NEW = 4
STAGES: dict[str, Any] = {
    "keep": (0.6, 0.4, 0.3),
    "layers": (2, 3, 4),
    "min_length": 64,
    "block": 8,
    "sub_block": 4,
    "local": 8,
    "q_window": 4,
}
BESIDE: dict[str, RuntimePolicy[Any] | None] = {
    "alone": None,
    "per_group": PromptPruning(**STAGES),
    "final": PromptPruning(kv_policy="final", **STAGES),
    "snapkv": Snapkv(keep=40, window=4),
}


def written(network: Network, call: Call, **more: Any) -> Any:
    given = {name: call.kwargs[name] for name in ("input_ids", "attention_mask")}
    return network.module.generate(  # type: ignore[operator]
        **given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **more
    )


@pytest.mark.parametrize(("name", "beams"), [*((name, 1) for name in BESIDE), ("per_group", 2)])
def test_it_is_bit_for_bit_what_it_is_without(name: str, beams: int) -> None:
    network, call = deep(), prompt(2, pads=7)
    policy, offload = BESIDE[name], KvOffload()
    state: Any = None if policy is None else policy.calibrate(network, [prompt()])
    found = []
    for order in ("policy", "policy offload", "offload policy"):  # what is put on first
        with ExitStack() as stack:
            for one in order.split():
                if one == "offload":
                    stack.enter_context(offload.on(network, offload.calibrate(network, [])))
                elif policy is not None:
                    stack.enter_context(policy.on(network, state))
            found.append(written(network, call, num_beams=beams))
    for ours in found[1:]:
        assert torch.equal(ours.sequences, found[0].sequences)
        assert all(torch.equal(one, other) for one, other in zip(ours.logits, found[0].logits, strict=True))


def steps(events: list[Event]) -> list[list[tuple[str, int]]]:
    """The events of each forward, which ends with the last block."""
    found: list[list[tuple[str, int]]] = [[]]
    for event in events:
        found[-1].append((event.what, event.block))
        if (event.what, event.block) == ("offload", DEPTH - 1):
            found.append([])
    assert not found.pop()
    return found


@pytest.mark.parametrize("name", ["alone", "per_group", "final"])
def test_copies_come_in_order_and_two_layers_are_on_the_device(name: str) -> None:
    network, policy, events = deep(), BESIDE[name], list[Event]()
    with ExitStack() as stack:
        if policy is not None:
            stack.enter_context(policy.on(network, policy.calibrate(network, [prompt()])))
        stack.enter_context(Offloading(network, decoder_of(network), log=events.append).on())
        made = written(network, prompt())
    forwards = steps(events)
    assert forwards[0] == [step for block in range(DEPTH) for step in (("compute", block), ("offload", block))]
    for forward in forwards[1:]:
        expected = [("prefetch", 0)]
        for block in range(DEPTH):
            expected += [("prefetch", block + 1)] * (block + 1 < DEPTH) + [("compute", block), ("offload", block)]
        assert forward == expected, "each layer comes once, before the block in front of it computes"
    assert len(forwards) == NEW
    layers = made.past_key_values.layers
    prompts = max(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    if name == "alone":
        assert max(event.held for event in events) <= 2 * prompts < sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    whole = 2 * 2 * LENGTH * network.module.model.layers[0].self_attn.head_dim * 4  # type: ignore[union-attr,index,operator]
    assert max(event.held for event in events) <= 2 * max(whole, prompts)
    assert max(event.held for event in events if event.what == "compute") > prompts


def test_chunks_crops_and_second_turns_read_the_same() -> None:
    network, ids_BN = deep(), prompt(2).kwargs["input_ids"]

    def read() -> list[Tensor]:
        cache, found = DynamicCache(config=network.config), []
        for part in ids_BN.split(40, dim=1):
            found.append(network.run(Call((), {"input_ids": part, "past_key_values": cache})).logits)
        cache.crop(-5)
        found.append(network.run(Call((), {"input_ids": ids_BN[:, :1], "past_key_values": cache})).logits)
        return found

    dense, offload = read(), KvOffload(resident=2)
    with offload.on(network, offload.calibrate(network, [])):
        ours = read()
    assert all(map(torch.equal, ours, dense))


def test_a_cache_that_was_filled_before_goes_on_and_is_whole_afterwards() -> None:
    network, offload = deep(), KvOffload()
    caches = [network.run(Call((), prompt().kwargs | {"use_cache": True})).past_key_values for _ in range(2)]
    one, two = (torch.tensor([[token]]) for token in (5, 6))
    found = []
    for cache, on in zip(caches, (False, True), strict=True):
        with ExitStack() as stack:
            if on:
                stack.enter_context(offload.on(network, offload.calibrate(network, [])))
            found.append(network.run(Call((), {"input_ids": one, "past_key_values": cache})).logits)
        found.append(network.run(Call((), {"input_ids": two, "past_key_values": cache})).logits)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_the_fast_decoder_leaves_generation_to_transformers() -> None:
    network, offload = deep(), KvOffload()
    ids_BN = prompt().kwargs["input_ids"]
    plain = Generator(network, 1, LENGTH + NEW).generate(ids_BN, NEW)
    with offload.on(network, offload.calibrate(network, [])):
        made = Generator(network, 1, LENGTH + NEW).generate(ids_BN, NEW)
    assert made.path == "transformers"
    assert torch.equal(made.tokens, plain.tokens)


def test_what_does_not_fit_is_refused() -> None:
    network, offload = deep(), KvOffload()
    assert list(KvOffload(resident=6).problems(network, None)) == [  # type: ignore[arg-type]
        "resident is 6, and the decoder has 6 blocks: nothing would be offloaded"
    ]
    call = Call((), prompt().kwargs | {"use_cache": True})
    bits, window = KVCacheInt(bits=8), StreamingLlm(window=20, sink=3)
    for policy, why in ((bits, "from a dynamic cache in 16 bits only"), (window, "evicts positions while tokens are written")):
        state: Any = policy.calibrate(network, [call])  # type: ignore[attr-defined]
        with (
            policy.on(network, state),  # type: ignore[attr-defined]
            offload.on(network, offload.calibrate(network, [])),
            pytest.raises(AerogelError, match=why),
        ):
            network.run(call)
