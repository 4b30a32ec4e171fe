"""Data of a search: one half is calibrated on, the other is held out to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aerogel.data import chats, needles, text
from aerogel.data.chats import Chat, Chats
from aerogel.data.needles import NeedlePrompt, Needles
from aerogel.engine.calibration import CalibrationInput, Samples, facts_of, hidden, prepare, shown
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import tokenizer_of
from aerogel.model.calls import Call
from aerogel.model.network import Network


@dataclass(frozen=True)
class HeldOut:
    """Held-out data that policies are judged by and never calibrated on."""

    calls: Sequence[Call]
    chats: Sequence[Chat] = ()
    """The same with what is replied, where it is chats."""
    needles: Sequence[NeedlePrompt] = ()
    """The same with the number that is asked for, where it is needle prompts."""
    prompt: int | None = None
    """Tokens of a sequence of text that are a prompt for the others; None: half of them, in one forward with the others."""

    def prompts(self, network: Network) -> dict[str, Any]:
        """A batch of prompts: the first chats without their answers, or the beginning of each sequence of text."""
        ids_BS = self.calls[0].kwargs["input_ids"]
        if self.chats:
            return next(iter(chats.prompts(self.chats, network.processor, len(ids_BS), network.device)))
        prompt_BS = ids_BS[:, : self.prompt or max(ids_BS.shape[1] // 2, 1)]
        return {"input_ids": prompt_BS, "attention_mask": torch.ones_like(prompt_BS)}


def wanted_of(network: Network, samples: CalibrationInput | None) -> Samples | Chats | Needles:
    """Return what is asked for; raises AerogelError for recorded calls, which cannot be halved."""
    wanted = shown(network, samples)
    if not isinstance(wanted, Samples | Chats | Needles):
        raise AerogelError(
            "rules are compared on text, chats or needle prompts that are read and replied to: give Samples, Chats or Needles, "
            "not recorded calls"
        )
    return wanted


def halves(network: Network, wanted: Samples | Chats | Needles, seed: int) -> tuple[Sequence[Any], HeldOut, dict[str, Any]]:
    """Return calls to calibrate on, as many to judge by, and facts about the first half; the two share no chat and no sequence."""
    if isinstance(wanted, Chats):
        found = chats.drawn(chats.read(wanted.source, wanted.column), 2 * wanted.count, seed)
        half = _half(len(found), "chats")
        calls, held = (
            chats.calls(some, network.processor, wanted.batch, network.device, padded=True) for some in (found[:half], found[half:])
        )
        facts = {"source": str(wanted.source), "count": half, "fingerprint": chats.fingerprint(found[:half])}
        return calls, HeldOut(held, found[half:]), facts
    if isinstance(wanted, Needles):
        asked = hidden(network, replace(wanted, count=2 * wanted.count), seed)
        half = _half(len(asked), "prompts")
        calls, held = (needles.calls(some, tokenizer_of(network), wanted.batch) for some in (asked[:half], asked[half:]))
        return calls, HeldOut(held, needles=asked[half:], prompt=wanted.length), facts_of(wanted, asked[:half])
    doubled = prepare(network, replace(wanted, count=2 * wanted.count), seed, head=True)
    rows_NL = torch.cat([call.kwargs["input_ids"] for call in doubled.calls])
    half = _half(len(rows_NL), "sequences")
    calls, held = (text.calls(some_NL, wanted.batch) for some_NL in (rows_NL[:half], rows_NL[half:]))
    return calls, HeldOut(held), doubled.facts | {"count": half, "fingerprint": text.fingerprint(rows_NL[:half])}


def _half(count: int, what: str) -> int:
    if count < 2:
        raise AerogelError(f"{count} {what}: one half is calibrated on and the other judges; give more")
    return count // 2
