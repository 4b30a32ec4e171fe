"""DivPrune on networks: what stays is what the greedy rule chooses among the embeddings of an image."""

from __future__ import annotations

import torch

from aerogel.methods.tokens.divprune import Divprune
from aerogel.numerics.token_selection import farthest_first
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened


def test_each_row_is_chosen_by_its_own_image() -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    method, seen = Divprune(keep=2), []

    def choose(stage: object) -> object:
        seen.append((stage, method.choose(stage)))  # type: ignore[arg-type]
        return seen[-1][1]

    with Shortening(network, decoder_of(network), {0: choose}).on():
        network.run(call)
    stage, selection = seen[0]
    for row, ids_N in enumerate(call.kwargs["input_ids"]):
        image = (ids_N == IMAGE_TOKEN).nonzero()[:, 0]
        chosen = image[farthest_first(stage.hidden_BKC[row, image], 2)]
        assert (selection.keep_BK[row] & (ids_N == IMAGE_TOKEN)).nonzero()[:, 0].tolist() == chosen.tolist()
        assert not torch.equal(selection.keep_BK[0], selection.keep_BK[1]) or row == 0


def test_the_choice_does_not_see_the_question() -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    ids_BN = call.kwargs["input_ids"]
    other_BN = torch.where(ids_BN == IMAGE_TOKEN, ids_BN, (ids_BN + 7) % 100)
    method, kept = Divprune(keep=2), []

    def choose(stage: object) -> object:
        selection = method.choose(stage)  # type: ignore[arg-type]
        kept.append(selection.keep_BK)  # type: ignore[union-attr]
        return selection

    with Shortening(network, decoder_of(network), {0: choose}).on():
        for ids in (ids_BN, other_BN):
            network.module(**{**call.kwargs, "input_ids": ids})
    assert torch.equal(*kept)
