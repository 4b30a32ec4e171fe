"""GemFilter against two plain forwards of transformers: one that chooses, and one of the chosen tokens as a prompt of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aerogel.inference.generate import Generator
from aerogel.methods.prompt_tokens.gemfilter import Gemfilter
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, Recorder, deep, prompt

MATRIX = {"options": {"min_length": 1, "keep": 0.9, "kernel": 3, "local": 2}}
POLICY = Gemfilter(keep=30, at=0.34, local=2, min_length=64)
NEW = 5


def chosen(network: Network, ids_N: Tensor, count: int = 30, kernel: int = 5) -> list[int]:
    """Places of the tokens by the formula, from the input of the third block."""
    block = network.module.model.layers[2]  # type: ignore[union-attr,index]
    taken: dict[str, Any] = {}
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: taken.update(x=args[0], **kwargs), with_kwargs=True)
    network.run(Call((), {"input_ids": ids_N[None], "use_cache": False}))
    handle.remove()
    attention, x_NC = block.self_attn, block.input_layernorm(taken["x"])
    query, key = (layer(x_NC).view(1, len(ids_N), -1, attention.head_dim).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *taken["position_embeddings"])
    scores = [sum(float(query[0, head, -1] @ key[0, head // 2, place]) for head in range(4)) for place in range(len(ids_N))]
    half = kernel // 2
    pooled = [sum(scores[max(0, place - half) : place + half + 1]) / kernel for place in range(len(ids_N) - 2)]
    best = sorted(range(len(pooled)), key=lambda place: -pooled[place])[: count - 2]
    return [*sorted(best), len(ids_N) - 2, len(ids_N) - 1]


def test_the_published_block_of_a_decoder_of_32() -> None:
    (rule,) = Gemfilter().rules(32).values()
    assert rule.args == (13,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("pads", [0, 7])
def test_what_is_left_is_read_as_a_prompt_of_its_own(pads: int) -> None:
    network = deep()
    call = prompt(2, pads=pads)
    recorder = Recorder(POLICY)
    with recorder.on(network) as shortening:
        ours_BNV = network.run(call).logits
        assert set(shortening.lengths) == {30 + pads}, "padding of the longest row stays beside the tokens"
    for row, start in ((0, 0), (1, pads)):
        ids_N = call.kwargs["input_ids"][row, start:]
        places = chosen(network, ids_N)
        assert (~recorder.gone[0][row, start:]).nonzero()[:, 0].tolist() == places
        alone_KV = network.run(Call((), {"input_ids": ids_N[places][None]})).logits[0]
        torch.testing.assert_close(ours_BNV[row, start:][places], alone_KV, rtol=0, atol=1e-5)
        gone = sorted(set(range(LENGTH - start)) - set(places))
        assert ours_BNV[row, start:][gone].isnan().all()


@pytest.mark.parametrize("fast", [False, True])
def test_generation_goes_on_behind_the_new_prompt(fast: bool) -> None:
    network = deep("Qwen3" if fast else "Llama")
    ids_BN = prompt().kwargs["input_ids"]
    with POLICY.on(network, POLICY.calibrate(network, [prompt()])):
        if fast:
            made = Generator(network, 1, LENGTH + NEW).generate(ids_BN, NEW)
            assert (made.path, made.reason) == ("fast_decoder", None)
            tokens = made.tokens[0].tolist()
        cache = DynamicCache(config=network.config)
        written: Any = network.module.generate(  # type: ignore[operator]
            ids_BN, attention_mask=torch.ones_like(ids_BN), past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert {layer.keys.shape[2] for layer in cache.layers} == {30 + NEW - 1}
    if fast:
        assert tokens == written[0, LENGTH:].tolist()
        return
    short_BK = ids_BN[:, chosen(network, ids_BN[0])]
    theirs: Any = network.module.generate(short_BK, attention_mask=torch.ones_like(short_BK), max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert written[0, LENGTH:].tolist() == theirs[0, 30:].tolist()


def test_a_prompt_that_is_short_or_behind_a_cache_is_dense_bit_for_bit() -> None:
    network = deep()
    call = Call((), prompt(2, pads=7).kwargs | {"use_cache": True})
    dense = network.run(call).logits
    with Recorder(Gemfilter(keep=30, min_length=LENGTH + 1)).on(network):
        assert torch.equal(network.run(call).logits, dense)
    ids_BN = prompt(length=40 + LENGTH).kwargs["input_ids"]
    found = []
    for policy in (None, POLICY):
        cache = network.run(Call((), {"input_ids": ids_BN[:, :40], "use_cache": True})).past_key_values
        behind = Call((), {"input_ids": ids_BN[:, 40:], "past_key_values": cache})
        if policy is None:
            found.append(network.run(behind).logits)
        else:
            with Recorder(policy).on(network):
                found.append(network.run(behind).logits)
    assert torch.equal(*found)


def test_the_first_pass_counts_as_computed() -> None:
    state = POLICY.calibrate(deep(), [prompt()])
    assert state.kept == pytest.approx((2 * LENGTH + DEPTH * 30) / (DEPTH * LENGTH))


def test_models_whose_positions_cannot_be_renumbered_are_refused() -> None:
    assert list(Gemfilter(kernel=4, local=1).problems(deep(), None)) == [  # type: ignore[arg-type]
        "local is 1, expected at least 2: the calibration compares predictions at the last tokens",
        "kernel is 4, expected an odd number",
    ]
    (why,) = Gemfilter().problems(deep(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), None)  # type: ignore[arg-type]
    assert why.startswith("positions are renumbered, and those of this model are by rotary embeddings of type dynamic")
