"""A deeper tiny network with prompts for it, and what a policy drops of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from aerogel.engine.opening import open_model
from aerogel.methods.prompt_tokens.policy import PromptPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from aerogel.runtime.tokens.stage import Rule, Selection, Stage
from tests.tiny import HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH, fill

DEPTH = 6
LENGTH = 96


def deep(kind: str = "Llama", **options: Any) -> Network:
    """A network of six blocks."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip
    module = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    fill(module, torch.Generator().manual_seed(0), 0.0)
    return open_model(module.requires_grad_(False))


def prompt(rows: int = 1, length: int = LENGTH, pads: int = 0) -> Call:
    """Prompts, the last one with padding on the left."""
    ids_BN = torch.randint(3, 112, (rows, length), generator=torch.Generator().manual_seed(3))
    mask_BN = torch.ones_like(ids_BN)
    mask_BN[-1, :pads] = 0
    return Call((), {"input_ids": ids_BN, "attention_mask": mask_BN, "use_cache": False})


class Recorder:
    """Rules of a policy that note which places (B, N) each stage of the last forward drops."""

    def __init__(self, policy: PromptPolicy, depth: int = DEPTH) -> None:
        self.policy, self.depth = policy, depth
        self.gone: dict[int, Tensor] = {}

    @contextmanager
    def on(self, network: Network) -> Iterator[Shortening]:
        rules = {block: self._noting(rule) for block, rule in self.policy.rules(self.depth).items()}
        with Shortening(
            network, decoder_of(network), rules, self.policy.watched(self.depth), drops_text=True, observe=self.policy.observer()
        ).on() as shortening:
            yield shortening

    def _noting(self, rule: Rule) -> Rule:
        def choose(stage: Stage) -> Selection | None:
            selection = rule(stage)
            keep_BK = torch.ones_like(stage.kind_BK, dtype=torch.bool) if selection is None else selection.keep_BK
            gone_BK = ~keep_BK if stage.kept.real_BK is None else ~keep_BK & stage.kept.real_BK
            gone_BN = torch.zeros(stage.kind_BN.shape, dtype=torch.int64)
            self.gone[stage.block] = gone_BN.scatter_add(1, stage.kept.at_BK, gone_BK.long()) > 0
            return selection

        return choose
