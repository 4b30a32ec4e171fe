"""UniPrefill against its formula: the fewest blocks that hold the share of attention, with the first tokens and the last."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.prompt_tokens.uniprefill import Uniprefill
from aerogel.model.calls import Call
from aerogel.runtime.tokens.scores import QueryKey, watching
from tests.methods.prompt_tokens.prompts import LENGTH, Recorder, deep, prompt
from tests.runtime.tokens.dropping import hidden_by_masks

MATRIX = {"options": {"min_length": 1, "first": 1, "local": 3, "block": 2, "mass": 0.5, "at": [0.5]}}
SMALL = {"min_length": 64, "first": 5, "local": 8, "block": 8}


def test_published_blocks_of_a_decoder_of_32() -> None:
    assert Uniprefill().watched(32) == (7, 11, 15, 19, 23, 27)
    assert list(Uniprefill().rules(32)) == [8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9])
def test_blocks_with_most_of_the_attention_stay(mass: float) -> None:
    network = deep()
    call = prompt()
    seen: dict[int, QueryKey] = {}
    with watching(network, {1: "model.layers.1.self_attn"}, lambda number, found: seen.update({number: found})):
        network.run(call)
    recorder = Recorder(Uniprefill(mass=mass, at=(0.34,), **SMALL))
    with recorder.on(network):
        network.run(call)
    score_HRN = seen[1].query_BHLD[0, :, -8:] @ seen[1].key_BHSD[0].transpose(1, 2) * seen[1].scale
    received_N = score_HRN.masked_fill(torch.ones(8, LENGTH).triu(LENGTH - 7).bool(), -torch.inf).softmax(-1).mean((0, 1))
    sums = received_N.unflatten(0, (-1, 8)).sum(1)
    held, stays = 0.0, set(range(5)) | set(range(LENGTH - 8, LENGTH))
    for block in sums.argsort(descending=True).tolist():
        if held >= mass * float(sums.sum()) and held > 0:
            break
        held += float(sums[block])
        stays |= set(range(8 * block, 8 * block + 8))
    assert set((~recorder.gone[2][0]).nonzero()[:, 0].tolist()) == stays


@pytest.mark.parametrize("pads", [0, 7])
def test_rows_that_keep_unlike_numbers_equal_masks(pads: int) -> None:
    network = deep()
    call = prompt(3, pads=pads)
    recorder = Recorder(Uniprefill(mass=0.6, at=(0.34, 0.5, 0.67), **SMALL))
    with recorder.on(network):
        ours_BNV = network.run(call).logits
    gone_BN = torch.stack(list(recorder.gone.values())).any(0)
    assert len(set(gone_BN.sum(1).tolist())) > 1
    assert not gone_BN[:, -8:].any()
    read_BN = ~gone_BN & call.kwargs["attention_mask"].bool()
    theirs_BNV = hidden_by_masks(network, call, recorder.gone)
    torch.testing.assert_close(ours_BNV[read_BN], theirs_BNV[read_BN], rtol=0, atol=1e-5)


def test_what_the_first_and_the_last_tokens_cover_is_left_alone() -> None:
    network = deep()
    call = prompt()
    with Recorder(Uniprefill(mass=0.1, min_length=1, first=48, local=48)).on(network):
        assert not network.run(call).logits.isnan().any()


def test_an_answer_behind_the_prompt_stays_and_asks_for_nothing() -> None:
    """Longer than the last tokens that stay; the prompt alone says what goes of it."""
    network, answer = deep(), 20
    ids_BN = prompt().kwargs["input_ids"]
    labels_BN = torch.full_like(ids_BN, -100)
    labels_BN[:, -answer:] = ids_BN[:, -answer:]
    gone = []
    for inputs in ({"input_ids": ids_BN, "labels": labels_BN}, {"input_ids": ids_BN[:, :-answer]}):
        recorder = Recorder(Uniprefill(mass=0.1, at=(0.34,), **SMALL))
        with recorder.on(network):
            network.run(Call((), {**inputs, "use_cache": False}))
        gone.append(recorder.gone[2][0])
    answered_N, alone_N = gone
    assert not answered_N[-answer:].any()
    assert bool(alone_N.any())
    assert torch.equal(answered_N[:-answer], alone_N)
