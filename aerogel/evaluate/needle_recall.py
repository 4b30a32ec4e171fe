"""Retrieval from long prompts: a number that was hidden in book text is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aerogel.data import needles, sources, text
from aerogel.data.needles import NeedlePrompt
from aerogel.evaluate.generation import continued
from aerogel.evaluate.measure import Measure, require_room, tokenizer_of
from aerogel.model.network import Network
from aerogel.options import Batch, Count, Seed, Share


@dataclass(frozen=True)
class NeedleRecall(Measure):
    """Share of numbers hidden in a long text that a model repeats when it is asked for them, by the depth at which they were hidden.

    Sentences and question are those of RULER's needle tasks; with several keys one is asked for among others. Replies are written greedily.
    """

    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image-text"})

    length: Count = 2048
    """Tokens of a prompt, the question among them."""
    depths: tuple[Share, ...] = needles.DEPTHS
    """Places of the number, as shares of the text."""
    count: Count = 4
    """Prompts for each depth."""
    keys: Count = 1
    """Numbers that are hidden, one of which is asked for."""
    source: str = "moby-dick"
    """Name of shipped text, a file, a folder or a dataset of the hub."""
    chat: bool | None = None
    """Send each prompt through the tokenizer's chat template; None: where it has one."""
    batch: Batch = 1
    """Prompts at once."""
    seed: Seed = 0
    """Seed that draws text, keys and numbers."""

    @classmethod
    def reads(cls, data: Any, column: str | None) -> dict[str, Any] | None:
        """Return the number of keys that the name of needle prompts says."""
        if not needles.is_named(data) or column is not None:
            return None
        keys = needles.keys_of(data)
        return {} if keys is None else {"keys": keys}

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return recall, recall_by_depth in the order of depths, what was read, and the first wrong replies.

        Raises AerogelError when the prompts do not fit the model.
        """
        tokenizer = tokenizer_of(network)
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        asked = needles.prompts(tokenizer, self.length, self.depths, self.count, self.keys, self.seed, self.source, chat)
        require_room(network, torch.stack([one.ids_L for one in asked]), needles.reply_tokens(tokenizer, asked), "needle_recall")
        replies = self.replies(network, asked)
        right = [one.answer in reply for one, reply in zip(asked, replies, strict=True)]
        rows = [right[place : place + self.count] for place in range(0, len(right), self.count)]
        wrong = [[one.answer, reply.strip()] for one, reply, found in zip(asked, replies, right, strict=True) if not found]
        return {
            "recall": sum(right) / len(right),
            "depths": list(self.depths),
            "recall_by_depth": [sum(row) / len(row) for row in rows],
            "length": self.length,
            "keys": self.keys,
            "count": len(right),
            "wrong": wrong[:5],
            "source": sources.name_of(self.source),
            "fingerprint": text.fingerprint(torch.stack([one.ids_L for one in asked])),
        }

    def right(self, network: Network, asked: Sequence[NeedlePrompt]) -> float:
        """Return the share of prompts whose number is in the network's reply."""
        replies = self.replies(network, asked)
        return sum(one.answer in reply for one, reply in zip(asked, replies, strict=True)) / len(asked)

    def replies(self, network: Network, asked: Sequence[NeedlePrompt]) -> list[str]:
        """Return what the network writes behind prompts."""
        tokenizer, replies = tokenizer_of(network), list[str]()
        new_tokens = needles.reply_tokens(tokenizer, asked)
        for ids_BL in torch.stack([one.ids_L for one in asked]).split(self.batch):
            inputs = network.placement.bring({"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)})
            made_BN = continued(network, inputs, new_tokens, measure="needle_recall")
            replies += tokenizer.batch_decode(made_BN, skip_special_tokens=True)
        return replies
