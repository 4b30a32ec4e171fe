"""Greedy samples against a plain loop of argmax."""

from __future__ import annotations

import pytest
import torch

from aerogel.evaluate.generation import Generation, continued, together
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests.tiny import FAMILIES
from tests.words import tokenizer


def greedy(net: Network, text: str, count: int) -> str:
    ids = net.processor(text)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(net.module(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # the tiny networks end at 2
            break
    return net.processor.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("chat", [False, True])
def test_samples_are_greedy_and_side_by_side(chat: bool) -> None:
    ours, theirs = (Network(FAMILIES["llama"].build(seed), Family("llama", ("llama",)), processor=tokenizer(chat=chat)) for seed in (0, 1))
    found = Generation(prompts=("we the people", "war and peace"), new_tokens=6).measure(ours, against=theirs)
    for sample in found["samples"]:
        seen = f"user {sample['prompt']} " if chat else sample["prompt"]
        assert sample["text"] == greedy(ours, seen, 6)
        assert sample["original"] == greedy(theirs, seen, 6)
    assert 0 <= found["same_share"] < 1


def test_without_an_original_there_is_one_side() -> None:
    net = Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer())
    found = Generation(prompts=("the world",), new_tokens=4).measure(net)
    assert set(found) == {"samples"}
    assert set(found["samples"][0]) == {"prompt", "text"}
    assert Generation(prompts=("the world",), new_tokens=4).measure(net, against=net)["same_share"] == 1


@pytest.mark.parametrize(("ours", "theirs", "shared"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([5], [6], 0), ([], [1], 0)])
def test_together_counts_until_they_part(ours: list[int], theirs: list[int], shared: int) -> None:
    assert together(torch.tensor(ours), torch.tensor(theirs)) == shared


def test_just_as_many_tokens_are_written_where_a_clock_asks_for_them() -> None:
    net = Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer())
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    net.module.generation_config.eos_token_id = int(continued(net, inputs, 1)[0, 0])
    assert continued(net, inputs, 5).shape == (1, 1), "the first token is the end"
    assert continued(net, inputs, 5, exactly=True).shape == (1, 5)
