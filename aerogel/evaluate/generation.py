"""Text that the model generates, side by side with the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from aerogel.evaluate.measure import Measure, require_finite, tokenizer_of
from aerogel.model.network import Network
from aerogel.options import Count

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write the first line of a novel that is set on a lighthouse.",
    "What is 17 plus 26? Show the steps.",
    "Name three uses of aerogel.",
)


@dataclass(frozen=True)
class Generation(Measure):
    """Greedy continuations of a few prompts: shows what a number hides, proves nothing.

    Greedy decoding parts for good at the first token that differs, so `same` is how long the two stay together, not how good either is.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"text", "image-text"})

    prompts: tuple[str, ...] = PROMPTS
    """Prompts to continue."""
    new_tokens: Count = 48
    """Tokens written after each prompt at most."""
    chat: bool | None = None
    """Send each prompt through the tokenizer's chat template as the user's turn; None: where it has one."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return samples (prompt, text; with an original also original, same, tokens) and same_share, its mean share."""
        tokenizer, samples = tokenizer_of(network), []
        for prompt in self.prompts:
            ours_T = self._continue(network, prompt)
            sample: dict[str, Any] = {"prompt": prompt, "text": tokenizer.decode(ours_T, skip_special_tokens=True)}
            if against is not None:
                theirs_T = self._continue(against, prompt)
                sample["original"] = tokenizer.decode(theirs_T, skip_special_tokens=True)
                sample["same"], sample["tokens"] = together(ours_T, theirs_T), max(len(ours_T), len(theirs_T))
            samples.append(sample)
        if against is None:
            return {"samples": samples}
        return {"samples": samples, "same_share": sum(s["same"] / max(s["tokens"], 1) for s in samples) / max(len(samples), 1)}

    def _continue(self, network: Network, prompt: str) -> Tensor:
        """The new tokens, new_T."""
        tokenizer = tokenizer_of(network)
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) if chat else prompt
        ids_1L = network.placement.bring(tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"])
        return continued(network, {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}, self.new_tokens)[0]


class _RequireFinite(LogitsProcessor):
    """Looks at the logits of each new token."""

    def __init__(self, network: Network, measure: str) -> None:
        self._network, self._measure = network, measure

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        require_finite(scores, self._network, self._measure)
        return scores


def continued(network: Network, inputs: Mapping[str, Any], new_tokens: int, exactly: bool = False, measure: str = "generation") -> Tensor:
    """Return what the network writes behind prompts, greedily: at most so many new tokens (B, N), or just as many, whatever they are.

    Raises AerogelError that names the measure and the model where logits are not finite.
    """
    tokenizer, module = tokenizer_of(network), network.module
    with torch.no_grad(), network.reading(inputs):
        written_BL: Tensor = module.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens if exactly else None,
            logits_processor=LogitsProcessorList([_RequireFinite(network, measure)]),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return written_BL[:, inputs["input_ids"].shape[1] :]


def together(ours_T: Tensor, theirs_T: Tensor) -> int:
    """Return how many tokens two continuations share before they part."""
    shared = min(len(ours_T), len(theirs_T))
    differ_T = (ours_T[:shared] != theirs_T[:shared]).nonzero()
    return int(differ_T[0]) if len(differ_T) else shared
