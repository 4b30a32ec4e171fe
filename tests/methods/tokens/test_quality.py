"""Effects on the zoo's model of scattered items: at a quarter of an image's tokens, rules keep the answers better than chance does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import aerogel
from aerogel.data import chats
from aerogel.methods.tokens.dart import Dart
from aerogel.methods.tokens.divprune import Divprune
from aerogel.methods.tokens.downsampling import Downsampling
from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.methods.tokens.random_tokens import RandomTokens
from aerogel.methods.tower_tokens.visionzip import Visionzip
from aerogel.methods.tower_tokens.vispruner import Vispruner
from aerogel.numerics.metrics import kl_divergence
from aerogel.runtime.predictions import logits_at, predicted
from aerogel.runtime.token_types import Vocabulary
from tests.questions import ZOO, zoo

pytestmark = pytest.mark.quality


@cache
def read() -> tuple[Any, Any]:
    """The model, and one forward of held-out chats."""
    network = aerogel.load(ZOO / "scattered-vlm", lazy=False, dtype=torch.float32)
    drawn = zoo("scattered").draw(zoo("collages").Items.held_out(), 12, seed=21)
    (call,) = chats.calls([zoo("scattered_vlm").read(chat) for chat in drawn], network.processor, 12, padded=True)
    return network, call


@torch.no_grad()
def answers(policy: TokenPolicy | None = None) -> torch.Tensor:
    """Logits of all tokens of all answers."""
    network, call = read()
    at_BS = predicted(call, Vocabulary.of(network))
    if policy is None:
        return logits_at(network, call, at_BS)
    with policy.acting(network, policy.fitted(network, [call])):
        return logits_at(network, call, at_BS)


def test_rules_beat_chance() -> None:
    """In nats an answer token; benchmarks/token_rules.py has all rules and more chats."""
    whole = answers()
    options = {Dart: {"layer": 2, "exact": True}, RandomTokens: {"seed": 1}}

    def lost_by(cls: type[TokenPolicy]) -> float:
        return kl_divergence(whole, answers(cls(**cls.strength(0.25), **options.get(cls, {}))))

    lost = {cls.__name__: lost_by(cls) for cls in (Divprune, Vispruner, Visionzip, Dart)}
    chance = min(map(lost_by, (RandomTokens, Downsampling)))
    assert max(lost.values()) < 0.7 * chance, (lost, chance)
    assert min(lost.values()) < 0.2 * chance, (lost, chance)
