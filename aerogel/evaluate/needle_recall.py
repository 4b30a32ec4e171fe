"""Retrieval from long prompts: a number that was hidden in book text is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aerogel.data import needles, sources, text
from aerogel.errors import AerogelError
from aerogel.evaluate.generation import continued
from aerogel.evaluate.measure import Measure, positions, require_embedded, tokenizer_of
from aerogel.model.network import Network
from aerogel.options import Batch, Count, Seed, Share

_MARGIN = 4
"""Tokens beyond those of the answer that a model may write."""


@dataclass(frozen=True)
class NeedleRecall(Measure):
    """Share of numbers hidden in a long text that a model repeats when it is asked for them, by the depth at which they were hidden.

    Sentences and question are those of RULER's needle tasks; with several keys one is asked for among others. Replies are written greedily.
    """

    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image-text"})

    length: Count = 2048
    """Tokens of a prompt, the question among them."""
    depths: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
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

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return recall, recall_by_depth in the order of depths, what was read, and the first wrong replies.

        Raises AerogelError when the prompts do not fit the model.
        """
        tokenizer = tokenizer_of(network)
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        asked = needles.prompts(tokenizer, self.length, self.depths, self.count, self.keys, self.seed, self.source, chat)
        new_tokens = _MARGIN + max(len(tokenizer(f" {one.answer}", add_special_tokens=False)["input_ids"]) for one in asked)
        room = positions(network)
        if room is not None and self.length + new_tokens > room:
            raise AerogelError(
                f"needle_recall: a prompt of {self.length} tokens and its answer do not fit the {room} positions of this model"
            )
        ids_NL = torch.stack([one.ids_L for one in asked])
        require_embedded(network, ids_NL)
        replies: list[str] = []
        for ids_BL in ids_NL.split(self.batch):
            inputs = network.placement.bring({"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)})
            made_BN = continued(network, inputs, new_tokens, measure="needle_recall")
            replies += tokenizer.batch_decode(made_BN, skip_special_tokens=True)
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
            "fingerprint": text.fingerprint(ids_NL),
        }
