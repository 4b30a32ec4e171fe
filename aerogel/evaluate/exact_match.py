"""Answers of a vision-language model to questions about images: exact match, and the share of expert calls skipped meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.errors import AerogelError
from aerogel.evaluate.generation import continued
from aerogel.evaluate.measure import Measure, require_finite, source_options, tokenizer_of
from aerogel.model.network import Network
from aerogel.model.structure.moe import routed_experts
from aerogel.numerics.metrics import kl_divergence, top1_agreement
from aerogel.options import Batch, Count, Seed
from aerogel.runtime.expert_skipping.counting import DECODING, PREFILL, Tally, counting
from aerogel.runtime.predictions import logits_at
from aerogel.runtime.token_types import PADDING, TEXT, VISION, Vocabulary


@dataclass(frozen=True)
class ExactMatch(Measure):
    """Share of answers that equal the expected ones exactly, and KL divergence of the predictions over the expected answers.

    Replies are written greedily. KL(original || network) in nats and the share of tokens for which both rank the same one first are
    means over the tokens of the expected answers, each after the true ones before it.
    """

    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image-text"})

    source: str = ""
    """A file of records with `messages`, the last of them the expected reply, and `images` (paths beside it): a .jsonl, say."""
    count: Count = 128
    """Chats, drawn by seed."""
    new_tokens: Count = 96
    """Tokens of a reply at most."""
    batch: Batch = 16
    """Chats at once."""
    seed: Seed = 0
    """Seed that draws the chats."""
    column: str | None = None
    """Column of the source's records with the chat; found by its name where none is given."""

    @classmethod
    def reads(cls, data: Any, column: str | None) -> dict[str, Any] | None:
        """Return source and column."""
        return source_options(data, column)

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return right (share), count, what was read; against an original kl and top1; of an MoE model, `skipped` where experts were.

        Raises AerogelError without a source.
        """
        if not self.source:
            raise AerogelError("exact_match needs chats with expected answers: --set exact_match.source=FILE.jsonl")
        asked = chats.drawn(chats.read(self.source, self.column), self.count, self.seed)
        is_moe = bool(routed_experts(network.module))
        with counting(network, Vocabulary.of(network)) if is_moe else nullcontext() as tally:
            right = self.right(network, asked)
        facts: dict[str, Any] = {"right": right, "count": len(asked), "source": self.source, "fingerprint": chats.fingerprint(asked)}
        if against is not None:
            facts |= self._moved(network, against, asked)
        return facts | ({"skipped": skipped(tally)} if tally is not None and tally.ratio() > 0 else {})

    def right(self, network: Network, asked: Sequence[Chat]) -> float:
        """The share of chats to which the network answers as it should."""
        right = start = 0
        for inputs in chats.prompts(asked, network.processor, self.batch, network.device):
            made_BN = continued(network, inputs, self.new_tokens, measure="exact_match")
            said = tokenizer_of(network).batch_decode(made_BN, skip_special_tokens=True)
            right += sum(one.strip() == chat.answer.strip() for one, chat in zip(said, asked[start:], strict=False))
            start += len(said)
        return right / len(asked)

    def _moved(self, network: Network, against: Network, asked: Sequence[Chat]) -> dict[str, float]:
        divergence = same = tokens = 0.0
        for call in chats.calls(asked, network.processor, self.batch, network.device, padded=True):
            at_BS = torch.nn.functional.pad(call.kwargs["labels"][:, 1:] != chats.IGNORED, (0, 1))
            theirs_NV, ours_NV = (logits_at(one, call, at_BS) for one in (against, network))
            for one, logits_NV in ((against, theirs_NV), (network, ours_NV)):
                require_finite(logits_NV, one, "exact_match")
            divergence += kl_divergence(theirs_NV, ours_NV) * len(ours_NV)
            same += top1_agreement(theirs_NV, ours_NV) * len(ours_NV)
            tokens += len(ours_NV)
        return {"kl": divergence / tokens, "top1": same / tokens, "tokens": tokens}


def skipped(tally: Tally) -> dict[str, Any]:
    """A tally as facts: shares of pairs dropped in prefill and decoding, of tokens without experts, and by layer of text and vision."""
    alive = slice(None, PADDING)
    kept, pairs = (counts[:, [TEXT, VISION]].sum(2).double() for counts in (tally.kept_LKP, tally.assignments_LKP))
    tokens = tally.tokens_LKP[:, alive].sum(2).double()
    return {
        "prefill": tally.ratio(PREFILL),
        "decode": tally.ratio(DECODING),
        "dropped_tokens": float(tally.dropped_LKP[:, alive].sum() / tokens.sum()),
        "layers": (1 - kept / pairs.clamp(min=1)).tolist(),
        "dropped_tokens_by_layer": (tally.dropped_LKP[:, alive].sum((1, 2)) / tokens.sum(1)).tolist(),
    }
