"""Random image tokens: of one seed the same, of two seeds others."""

from __future__ import annotations

import torch

from aerogel.methods.tokens.random_tokens import RandomTokens
from tests.tiny import FAMILIES, opened


def test_the_seed_decides() -> None:
    network = opened("internvl")
    call = FAMILIES["internvl"].calls(1)[0]
    places = []
    for seed in (0, 0, 1, 2, 3):
        method = RandomTokens(keep=2, seed=seed)
        with method.on(network, method.calibrate(network, [call])):
            places.append(network.run(call).logits.isnan().any(-1))
    assert torch.equal(places[0], places[1])
    assert any(not torch.equal(places[0], other) for other in places[2:])
