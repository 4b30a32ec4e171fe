"""Stages as rules see them, in a forward of a tiny network, and what a rule said of each."""

from __future__ import annotations

from typing import Any

from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Rule, Selection, Stage
from tests.tiny import FAMILIES, opened


def seen(network: Network, call: Call, method: TokenPolicy) -> dict[int, tuple[Stage, Selection | None]]:
    """What each rule of a method saw and chose, by the number of its block."""
    found: dict[int, tuple[Stage, Selection | None]] = {}

    def asked(block: int, rule: Rule) -> Rule:
        def ask(stage: Stage) -> Selection | None:
            selection = rule(stage)
            found[block] = stage, selection
            return selection

        return ask

    decoder = decoder_of(network)
    rules = {block: asked(block, rule) for block, rule in method.rules(decoder.depth).items()}
    tower = method.watched_tower(network, method.fitted(network, [call]))
    with Shortening(network, decoder, rules, method.watched(decoder.depth), tower=tower).on():
        network.run(call)
    return found


def generated(network: Network, call: Call, count: int = 5, **more: Any) -> Any:
    """A greedy generation with scores."""
    given = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    return network.module.generate(**given, **settings, **more, output_logits=True)


def first_call(name: str) -> tuple[Network, Call]:
    """A tiny network and a call with an image in each row."""
    return opened(name), FAMILIES[name].calls(1)[0]
