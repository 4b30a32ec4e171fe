"""FastKV against its formula, and its cache against the planned lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.inference.generate import Generator
from aerogel.methods.prompt_tokens.fastkv import Fastkv
from aerogel.model.calls import Call
from aerogel.runtime.tokens.scores import QueryKey, watching
from tests.methods.prompt_tokens.prompts import DEPTH, LENGTH, Recorder, deep, prompt
from tests.runtime.tokens.dropping import hidden_by_masks

MATRIX = {"options": {"min_length": 1, "window": 3, "kernel": 3, "keep": 0.6}}


def test_the_published_block_of_a_decoder_of_32() -> None:
    assert list(Fastkv().rules(32)) == [16]
    assert Fastkv().watched(32) == (15,)


@pytest.mark.parametrize("keep", [0.2, 30])
@pytest.mark.parametrize("pads", [0, 7])
def test_what_the_last_tokens_attend_to_stays(keep: Any, pads: int) -> None:
    network = deep()
    call = prompt(2, pads=pads)
    seen: dict[int, QueryKey] = {}
    with watching(network, {2: "model.layers.2.self_attn"}, lambda number, found: seen.update({number: found})):
        network.run(call)
    recorder = Recorder(Fastkv(keep=keep, window=4, kernel=5, min_length=64))
    with recorder.on(network):
        ours_BNV = network.run(call).logits
    for row, start in ((0, 0), (1, pads)):
        received = [0.0] * LENGTH
        for head in range(4):
            score_RN = seen[2].query_BHLD[row, head, -4:] @ seen[2].key_BHSD[row, head].T * seen[2].scale
            score_RN[:, :start] = -torch.inf
            score_RN = score_RN.masked_fill(torch.ones(4, LENGTH).triu(LENGTH - 3).bool(), -torch.inf)
            received = [a + float(b) for a, b in zip(received, score_RN.softmax(-1).sum(0), strict=True)]
        outer = [0.0] * 2 + received[:-4] + [0.0] * 6
        pooled = {place: sum(outer[place : place + 5]) / 5 for place in range(start, LENGTH - 4)}
        count = keep if isinstance(keep, int) else round(keep * (LENGTH - start))
        best = sorted(pooled, key=lambda place: -pooled[place])[:count]
        stays = [place for place in range(LENGTH) if not recorder.gone[3][row, place]]
        assert stays == sorted([*range(start), *best, *range(LENGTH - 4, LENGTH)])
    theirs_BNV = hidden_by_masks(network, call, recorder.gone)
    read_BN = ~recorder.gone[3] & call.kwargs["attention_mask"].bool()
    torch.testing.assert_close(ours_BNV[read_BN], theirs_BNV[read_BN], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("cache", "expected"), [(0.25, [24] * 6), (1.0, [96] * 3 + [27] * 3), (0.5, [48] * 3 + [27] * 3)])
def test_every_block_has_its_share_of_the_cache(cache: float, expected: list[int]) -> None:
    """A fifth of 96 tokens, 19, and 8 go on; what a block has not is not cut."""
    network = deep()
    policy = Fastkv(min_length=64, cache=cache)
    call = Call((), prompt().kwargs | {"use_cache": True})
    with policy.on(network, policy.calibrate(network, [call])):
        layers = network.run(call).past_key_values.layers
        assert [layer.keys.shape[2] for layer in layers] == expected
        assert {layer.get_seq_length() for layer in layers} == {LENGTH}
        ids_BN = call.kwargs["input_ids"]
        made = Generator(network, 1, LENGTH + 6).generate(ids_BN, 6)
        theirs: Any = network.module.generate(ids_BN, attention_mask=torch.ones_like(ids_BN), max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert made.path == "fast_decoder"
    assert torch.equal(made.tokens, theirs[:, LENGTH:])
    assert len(expected) == DEPTH


def test_short_prompts_are_dense_bit_for_bit() -> None:
    network = deep()
    policy = Fastkv(min_length=LENGTH + 1)
    call = Call((), prompt(2, pads=7).kwargs | {"use_cache": True})
    dense = network.run(call)
    with policy.on(network, policy.calibrate(network, [call])):
        ours = network.run(call)
    assert torch.equal(ours.logits, dense.logits)
    assert all(
        torch.equal(one.keys, other.keys) for one, other in zip(ours.past_key_values.layers, dense.past_key_values.layers, strict=True)
    )


def test_an_even_kernel_is_refused() -> None:
    assert list(Fastkv(kernel=4).problems(deep(), None)) == ["kernel is 4, expected an odd number"]  # type: ignore[arg-type]
