"""The oracle of image tokens against brute force, in which what is left out is hidden by masks."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.tokens.random_tokens import RandomTokens
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence
from tests.runtime.tokens.dropping import hidden_by_masks
from tests.tiny import IMAGE_TOKEN, TINY, opened
from tests.tiny_vision import TILED

ANSWER = 4


def oracle() -> Any:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("token_oracle")
    finally:
        sys.path.remove(folder)


def answered(name: str) -> Call:
    """Two prompts with an image each, padding before the second; the last tokens are the answers."""
    call = TINY[name].calls(2)[1]
    labels = call.kwargs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return Call((), {**call.kwargs, "labels": labels})


def moved(network: Network, call: Call, gone_BN: Tensor) -> list[float]:
    """The divergence of each row's answer with some tokens hidden from the first block on."""
    bare = Call((), {key: value for key, value in call.kwargs.items() if key != "labels"})
    whole, other = network.run(bare).logits, hidden_by_masks(network, bare, {0: gone_BN})
    at = slice(-ANSWER - 1, -1)
    return [kl_divergence(one[at], two[at]) for one, two in zip(whole, other, strict=True)]


def least(network: Network, call: Call, kept: int, gone_BN: Tensor) -> Tensor:
    """What goes so that so many are left and the answers move least, row by row, of all ways to leave out more."""
    image = [
        (ids_N == IMAGE_TOKEN).logical_and(~gone_N).nonzero()[:, 0].tolist()
        for ids_N, gone_N in zip(call.kwargs["input_ids"], gone_BN, strict=True)
    ]
    best_B: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * 2
    for places in itertools.combinations(range(len(image[0])), len(image[0]) - kept):
        tried_BN = gone_BN.clone()
        for row in (0, 1):
            tried_BN[row, [image[row][place] for place in places]] = True
        for row, kl in enumerate(moved(network, call, tried_BN)):
            best_B[row] = min(best_B[row], (kl, places))
    found_BN = gone_BN.clone()
    for row, (_, places) in enumerate(best_B):
        found_BN[row, [image[row][place] for place in places]] = True
    return found_BN


def test_the_one_that_goes_is_the_one_that_is_missed_least() -> None:
    network, call = opened("llava"), answered("llava")
    expected_BN = least(network, call, 3, torch.zeros_like(call.kwargs["input_ids"], dtype=torch.bool))
    assert torch.equal(~oracle().kept(network, call, 3), expected_BN)


def test_with_a_round_for_each_token_those_left_are_judged_anew() -> None:
    network, call = opened("llava"), answered("llava")
    gone_BN = torch.zeros_like(call.kwargs["input_ids"], dtype=torch.bool)
    for count in (3, 2, 1):
        gone_BN = least(network, call, count, gone_BN)
    assert torch.equal(~oracle().kept(network, call, 1, rounds=3), gone_BN)


def test_groups_go_together() -> None:
    network, call = opened("llava"), answered("llava")
    keep_BN = oracle().kept(network, call, 0.5, group=2)
    kl_BN = []
    for start in (0, 2):
        gone_BN = torch.zeros_like(keep_BN)
        for row, ids_N in enumerate(call.kwargs["input_ids"]):
            gone_BN[row, (ids_N == IMAGE_TOKEN).nonzero()[start : start + 2, 0]] = True
        kl_BN.append(moved(network, call, gone_BN))
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        first_goes = kl_BN[0][row] < kl_BN[1][row]
        assert keep_BN[row, ids_N == IMAGE_TOKEN].tolist() == [not first_goes] * 2 + [first_goes] * 2


def test_no_draw_of_as_many_is_nearer() -> None:
    network, call = opened("llava"), answered("llava")
    bound = oracle().AnswerOracle(keep=3)
    state = bound.calibrate(network, [call])
    draws = [RandomTokens(keep=3, seed=seed).calibrate(network, [call]) for seed in range(6)]
    assert all(state.kept == draw.kept for draw in draws)
    assert state.kl <= min(draw.kl for draw in draws) + 1e-6
    with bound.on(network, state), pytest.raises(AerogelError, match="has not seen the answers of these prompts"):
        network.run(answered("llava"))


def test_separators_of_tiles_stay() -> None:
    network, call = opened("llava_next"), answered("llava_next")
    keep_BN = oracle().kept(network, call, 6, group=3)
    for row, tokens in enumerate(TILED["llava_next"].tokens):
        image_V = keep_BN[row, call.kwargs["input_ids"][row] == IMAGE_TOKEN]
        assert len(image_V) == tokens
        assert int(image_V.sum()) == 6 + (4, 2)[row]
        assert image_V[-1]
