"""Choices and caches: a second turn on the same cache reuses the first choice, a fresh prompt chooses again, static caches hide nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.data.chats import IGNORED
from aerogel.methods.tokens.dart import Dart
from aerogel.methods.tokens.divprune import Divprune
from aerogel.methods.tokens.fastv import Fastv
from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.methods.tokens.pyramid_drop import PyramidDrop
from aerogel.methods.tokens.sparsevlm import Sparsevlm
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.predictions import Predictions
from aerogel.runtime.token_types import Vocabulary
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Rule
from tests.methods.tokens.staged import generated
from tests.runtime.tokens.dropping import grown, hidden_by_masks
from tests.tiny import FAMILIES, opened


class Choices:
    """A method that remembers how often it was asked and which places of a forward it dropped."""

    def __init__(self, method: TokenPolicy) -> None:
        self.method = method
        self.gone: list[Tensor] = []

    def on(self, network: Network) -> Any:
        """The method on a network."""
        decoder = decoder_of(network)
        rules = {block: self._asked(rule) for block, rule in self.method.rules(decoder.depth).items()}
        return Shortening(network, decoder, rules, self.method.watched(decoder.depth)).on()

    def _asked(self, rule: Rule) -> Rule:
        def ask(stage: Any) -> Any:
            if not stage.vision_BK.any():  # as a policy does: nothing may be dropped
                return None
            selection = rule(stage)
            if selection is not None:
                self.gone.append(~selection.keep_BK)
            return selection

        return ask


def question(seed: int, length: int = 12) -> Tensor:
    return torch.randint(3, 112, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", [Fastv(layer=1, keep=2), Sparsevlm(layers=(0,), keep=(2,), recycled=0.0), Divprune(keep=2)])
def test_a_second_turn_on_the_same_cache_reuses_the_first_choice(method: TokenPolicy) -> None:
    """The rule is asked once; both turns answer as a forward of everything in which nothing attends to what the first turn dropped."""
    network, first = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)[0]
    length, second_BM = first.kwargs["input_ids"].shape[1], question(1)
    choices = Choices(method)
    with choices.on(network):
        before = network.run(Call((), {**first.kwargs, "use_cache": True}))
        mask = torch.ones(2, length + second_BM.shape[1], dtype=torch.long)
        given = {"input_ids": second_BM, "attention_mask": mask, "past_key_values": before.past_key_values, "use_cache": True}
        # Positions of a prompt of pictures go on from where their grid ended.
        delta_B1 = network.module.model.rope_deltas
        at_BM = length + torch.arange(second_BM.shape[1])[None] + delta_B1
        after = network.run(Call((), {**given, "position_ids": at_BM[None].expand(3, -1, -1)}))
    (gone_BN,) = choices.gone
    assert int(gone_BN.sum()) == 2 * 6
    whole = grown(first, torch.cat([first.kwargs["input_ids"], second_BM], dim=1))
    block = (
        min(block for block in method.rules(2) if block == 0 or not isinstance(method, Sparsevlm))
        if not isinstance(method, Sparsevlm)
        else 1
    )
    theirs_BNV = hidden_by_masks(network, whole, {block: torch.nn.functional.pad(gone_BN, (0, second_BM.shape[1]))})
    torch.testing.assert_close(after.logits, theirs_BNV[:, length:], rtol=0, atol=1e-5)
    held = before.past_key_values.layers[1]
    assert (held.get_seq_length(), held.keys.shape[2]) == (length + second_BM.shape[1], length + second_BM.shape[1] - 6)


@pytest.mark.parametrize(("method", "reuses"), [(Fastv(layer=1, keep=2), False), (Divprune(keep=2), True)])
def test_a_fresh_prompt_chooses_again(method: TokenPolicy, reuses: bool) -> None:
    """By the question where the rule reads it: for some of six questions another choice than for the first. Else the same for all."""
    network, call = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)[0]
    choices = Choices(method)
    with choices.on(network):
        for seed in range(6):
            ids_BN = call.kwargs["input_ids"].clone()
            ids_BN[:, -6:] = question(seed, 6)
            network.run(Call((), {**call.kwargs, "input_ids": ids_BN}))
    assert len(choices.gone) == 6
    assert all(torch.equal(choices.gone[0], other) for other in choices.gone[1:]) == reuses


@pytest.mark.parametrize(
    "method",
    [Fastv(layer=1, keep=2), Sparsevlm(layers=(0,), keep=(2,)), Dart(layer=1, keep=3, image_pivots=1)],
    ids=lambda method: type(method).__name__,
)
def test_a_static_cache_gives_what_a_dynamic_one_does(method: TokenPolicy) -> None:
    """The room behind the keys of the prompt is nothing that a rule reads."""
    network, call = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(2)[1]
    state = method.calibrate(network, [call])
    with method.on(network, state):
        made = [generated(network, call, **more) for more in ({}, {"cache_implementation": "static"})]
    dynamic, static = (torch.stack(one.logits) for one in made)
    torch.testing.assert_close(static, dynamic, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [Fastv(layer=1, keep=2), PyramidDrop(layers=(1,), keep=(2,)), Sparsevlm(layers=(0,), keep=(2,), recycled=0.0)],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("read_for_loss", [False, True])
def test_an_answer_behind_the_prompt_changes_no_choice(method: TokenPolicy, read_for_loss: bool) -> None:
    """Predictions of an answer are compared in one forward of prompt and answer: rules choose as if it were not there yet."""
    network, prompt = opened("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].calls(1)[0]
    asked = prompt.kwargs["input_ids"]
    choices = Choices(method)
    for seed in range(6):  # without the labels some of six answers choose otherwise
        chat = grown(prompt, torch.cat([asked, question(seed)], dim=1))
        labels_BN = chat.kwargs["input_ids"].clone()
        labels_BN[:, : asked.shape[1]] = IGNORED
        labelled = Call((), {**chat.kwargs, "labels": labels_BN})
        predictions = Predictions(network, [labelled], Vocabulary.of(network))
        with choices.on(network):
            if read_for_loss:
                network.run(labelled)
            else:
                predictions.moved()
    with choices.on(network):
        network.run(prompt)
    *with_answers, alone_BN = choices.gone
    assert len(with_answers) == 6
    assert all(torch.equal(gone_BN[:, : asked.shape[1]], alone_BN) for gone_BN in with_answers)
    assert not any(gone_BN[:, asked.shape[1] :].any() for gone_BN in with_answers)
