"""Predictions of a model where answers are predicted, and how far a policy that is on moves them.

N tokens of answers, V vocabulary, B rows, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from aerogel.data.chats import IGNORED
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence, top1_agreement
from aerogel.runtime.token_types import PADDING, VISION, Vocabulary

Made = TypeVar("Made")
_ROWS = 1024
"""Rows of logits compared at once."""


class Moved(NamedTuple):
    """Distance of predictions from those of the model as it was."""

    kl: float
    """KL(model || with policy) in nats, the mean over answer tokens."""
    top1: float
    """Share of answer tokens for which both rank the same token first."""


class Predictions:
    """The predictions of the answers in some calls by the model as it is now, kept to compare others with: N x V numbers of four bytes.

    Answers are what `labels` of a call say, where it has any, else every token but the first and padding.
    """

    def __init__(self, network: Network, calls: Sequence[Call], vocabulary: Vocabulary) -> None:
        """Run the model; raises AerogelError for calls without token ids, or when there is nothing to predict."""
        self.network, self.vocabulary = network, vocabulary
        self._memory: dict[Hashable, Any] = {}
        self._calls = [_without(call, "logits_to_keep") for call in calls]
        self._predicted = [self.judged(call) for call in calls]
        self.tokens = sum(int(at_BS.sum()) for at_BS in self._predicted)
        if not self.tokens:
            raise AerogelError("these calls hold no answer to predict; give chats with answers, or longer text")
        self._whole = [self.logits(call, at_BS) for call, at_BS in zip(self._calls, self._predicted, strict=True)]
        shown = [vocabulary.kinds(call.kwargs) for call in self._calls]
        self.has_images = any(bool((kind_BS == VISION).any()) for kind_BS in shown)
        """True where a token is of an image."""

    @property
    def forwards(self) -> list[Call]:
        """Return the calls without labels: running them computes no loss."""
        return [_without(call, "labels") for call in self._calls]

    def judged(self, call: Call) -> Tensor:
        """Return the positions at_BS of a call whose predictions are compared."""
        return predicted(call, self.vocabulary)

    def moved(self) -> Moved:
        """Return how far the predictions are from those kept under the policy that is on; one pass over the calls."""
        kl = same = 0.0
        for whole_NV, other_NV in self.pairs():
            kl += divergence(whole_NV, other_NV)
            same += top1_agreement(whole_NV, other_NV) * len(whole_NV) if len(whole_NV) else 0.0
        return Moved(kl / self.tokens, same / self.tokens)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the predictions kept and those of the network as it is, call by call."""
        for call, at_BS, whole_NV in zip(self._calls, self._predicted, self._whole, strict=True):
            yield whole_NV, self.logits(call, at_BS)

    def logits(self, call: Call, at_BS: Tensor) -> Tensor:
        """Return the logits of some positions (N, V)."""
        return logits_at(self.network, call, at_BS)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` gave when this key was first asked for: several rules calibrated on the same answers share it."""
        if key not in self._memory:
            self._memory[key] = make()
        found: Made = self._memory[key]
        return found


class Continuations(Predictions):
    """Predictions of what comes behind prompts of text: a prompt is read in a forward of its own, and the rest from the cache."""

    def __init__(self, network: Network, calls: Sequence[Call], vocabulary: Vocabulary, prompt: int) -> None:
        """Run the model; prompts are the first `prompt` tokens of each row, without padding."""
        self._prompt = prompt
        super().__init__(network, calls, vocabulary)

    def judged(self, call: Call) -> Tensor:
        """Return the positions whose next token is behind the prompt."""
        at_BS = predicted(call, self.vocabulary)
        at_BS[:, : self._prompt - 1] = False
        return at_BS

    def logits(self, call: Call, at_BS: Tensor) -> Tensor:
        """Return the logits of some positions (N, V), the prompt's last one and those behind it."""
        ids_BS = call.kwargs["input_ids"]
        first = self.network.run(Call((), {"input_ids": ids_BS[:, : self._prompt], "use_cache": True, "logits_to_keep": 1}))
        given = {"input_ids": ids_BS[:, self._prompt :], "use_cache": True, "past_key_values": first.past_key_values}
        behind_BTV = torch.cat([first.logits[:, -1:], self.network.run(Call((), given)).logits], dim=1)
        found_NV: Tensor = behind_BTV[at_BS[:, self._prompt - 1 :]].float()
        return found_NV


def logits_at(network: Network, call: Call, at_BS: Tensor) -> Tensor:
    """The logits of some positions (N, V), float32; no others are computed, and no loss.

    `labels` of the call are seen by policies that are on, for which the prompt ends where they begin, and not by the model.
    """
    head: Any = network.module.get_output_embeddings()  # type: ignore[operator]
    handles = [
        head.register_forward_pre_hook(lambda _, args: (args[0][at_BS][None],)),
        network.module.register_forward_pre_hook(_without_labels, with_kwargs=True),
    ]
    try:
        return network.run(call).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()


def _without_labels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {key: value for key, value in kwargs.items() if key != "labels"}


def divergence(whole_NV: Tensor, other_NV: Tensor) -> float:
    """Sum over rows of KL(whole || other) in nats, at least zero; raises AerogelError where it is none."""
    pairs = zip(whole_NV.split(_ROWS), other_NV.split(_ROWS), strict=True)
    total = sum(kl_divergence(p_RV, q_RV) * len(p_RV) for p_RV, q_RV in pairs if len(p_RV))
    if math.isnan(total):
        raise AerogelError("the logits of the model, or of the model with the policy, hold NaN or infinity; get a sound copy of it")
    return max(0.0, total)


def _without(call: Call, name: str) -> Call:
    return Call(call.args, {key: value for key, value in call.kwargs.items() if key != name})


def predicted(call: Call, vocabulary: Vocabulary) -> Tensor:
    """Return the positions at_BS whose next token is part of an answer."""
    labels_BS = call.kwargs.get("labels")
    kind_BS = vocabulary.kinds(call.kwargs)
    answer_BS = kind_BS != PADDING if labels_BS is None else labels_BS != IGNORED
    at_BS = torch.zeros_like(answer_BS)
    at_BS[:, :-1] = answer_BS[:, 1:] & (kind_BS[:, :-1] != PADDING)
    return at_BS
