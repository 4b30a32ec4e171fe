"""Tokens dropped at random, and the same forward with all tokens under masks that hide them: the reference of every way of dropping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


class Dropped:
    """Rules that drop half of the tokens that may go, at random, and remember which."""

    def __init__(self) -> None:
        self.gone: dict[int, Tensor] = {}
        """Places (B, N) that each rule dropped in the last forward, by the number of its block."""

    def rule(self, block: int) -> Rule:
        return partial(self._choose, block)

    def _choose(self, block: int, stage: Stage) -> Selection:
        random = torch.Generator().manual_seed(block)
        keep_BK = torch.ones_like(stage.kind_BK, dtype=torch.bool)
        for row, keep_K in enumerate(keep_BK):
            inner_K = stage.real_BK[row].clone()
            inner_K[-2:] = False
            choice = (stage.vision_BK[row] if stage.vision_BK.any() else inner_K).nonzero()[:, 0]
            keep_K[choice[torch.randperm(len(choice), generator=random)[: len(choice) // 2]]] = False
        gone_BN = torch.zeros(len(keep_BK), stage.kind_BN.shape[1], dtype=torch.bool)
        self.gone[block] = gone_BN.scatter(1, stage.kept.at_BK, ~keep_BK)
        return Selection(keep_BK)


def hidden_by_masks(network: Network, call: Call, gone: Mapping[int, Tensor]) -> Tensor:
    """Logits of a forward of all tokens in which, from each block on, nothing attends to what is gone but itself."""

    def hook(number: int) -> Callable[..., Any]:
        def hide(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            rows, length = call.kwargs["input_ids"].shape
            sees = torch.ones(length, length).tril().bool()[None] & call.kwargs["attention_mask"][:, None, :].bool()
            for block, gone_BN in gone.items():
                sees = sees & ~gone_BN[:, None, :] if block <= number else sees
            return args, kwargs | {"attention_mask": (sees | torch.eye(length).bool())[:, None].expand(rows, 1, -1, -1)}

        return hide

    blocks = decoder_of(network).parts(network)
    with temporary_hooks([block.register_forward_pre_hook(hook(number), with_kwargs=True) for number, block in enumerate(blocks)]):
        return network.run(call).logits


def grown(call: Call, ids_BN: Tensor) -> Call:
    """The call with more tokens of text behind its own."""
    more = ids_BN.shape[1] - call.kwargs["input_ids"].shape[1]
    longer = dict(call.kwargs, input_ids=ids_BN, use_cache=False)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in longer:
            longer[name] = nn.functional.pad(longer[name], (0, more), value=value)
    return Call((), longer)


def grown_places(gone: Mapping[int, Tensor], length: int) -> dict[int, Tensor]:
    """The same places among more tokens."""
    return {block: nn.functional.pad(gone_BN, (0, length - gone_BN.shape[1])) for block, gone_BN in gone.items()}
