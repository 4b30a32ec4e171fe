"""Tokens are merged inside a vision tower, between attention and feed-forward of its blocks (ToMe, arXiv:2210.09461).

I images, S tokens of one in a block, P patches of one, H heads, D channels of a head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.hooks import temporary_hooks
from aerogel.model.network import Network
from aerogel.numerics.token_merging import bipartite, merged
from aerogel.runtime.attention import attending
from aerogel.runtime.tokens.images import marked, whole_marks
from aerogel.runtime.tokens.kept import Kept


@dataclass(frozen=True)
class MergingBlock:
    """A block of a tower in which tokens are merged."""

    attention: str
    """Full name of its attention."""
    norm: str
    """Full name of the module that reads the sum of the attention and what the block got: tokens are merged before it."""


def merging_blocks(network: Network, call: Call, attentions: Sequence[str]) -> tuple[MergingBlock, ...]:
    """Find what runs next after each of these attentions in its block, in a forward."""
    module, after = network.module, dict.fromkeys(attentions, "")
    parents = {name: name.rpartition(".")[0] for name in attentions}
    waiting: dict[str, str] = {}

    def ended(attention: str, *_: Any) -> None:
        waiting[parents[attention]] = attention

    def begun(name: str, *_: Any) -> None:
        if attention := waiting.pop(name.rpartition(".")[0], ""):
            after[attention] = name

    siblings = [f"{parent}.{key}" for parent in parents.values() for key, _ in module.get_submodule(parent).named_children()]
    handles = [module.get_submodule(name).register_forward_hook(partial(_silent, ended, name)) for name in attentions]
    handles += [module.get_submodule(name).register_forward_pre_hook(partial(_silent, begun, name)) for name in siblings]
    with temporary_hooks(handles):
        network.run(call)
    if absent := [name for name, norm in after.items() if not norm]:
        raise AerogelError(f"nothing runs behind {absent[0]} in its block; tokens are merged between attention and feed-forward")
    return tuple(MergingBlock(*pair) for pair in after.items())


def _silent(see: Callable[..., None], name: str, *_: Any) -> None:
    see(name)


class TowerMerging:
    """Merges in each block, and puts what the projector gives back to the places of the patches; the others are marked."""

    def __init__(self, counts: Sequence[int], class_token: bool, proportional: bool) -> None:
        """Merge so many pairs in each block.

        With `proportional` attention weighs a token by its patches, and sizes go on to later blocks.
        """
        self._counts, self._class_token, self._proportional = counts, class_token, proportional
        self._place_IS: Tensor | None = None
        self._size_IS: Tensor | None = None
        self._key_ISD: Tensor | None = None
        self._patches = 0

    @contextmanager
    def on(self, network: Network, blocks: Sequence[MergingBlock], projector: str) -> Iterator[None]:
        """Merge in every forward with images for a while."""
        numbers: Mapping[str, int] = {block.attention: number for number, block in enumerate(blocks)}
        module = network.module
        with ExitStack() as stack:
            stack.callback(module.register_forward_pre_hook(self._forget).remove)
            stack.enter_context(attending(network, numbers, lambda name: partial(self._attend, numbers[name])))
            for number, block in enumerate(blocks):
                stack.callback(module.get_submodule(block.norm).register_forward_pre_hook(partial(self._merge, number)).remove)
            stack.callback(module.get_submodule(projector).register_forward_hook(self._spread).remove)
            stack.enter_context(whole_marks(network))
            yield

    def _forget(self, *_: Any) -> None:
        self._place_IS = self._size_IS = self._key_ISD = None

    def _attend(self, number: int, query_IHSD: Tensor, key_IHSD: Tensor, *given: Any, **more: Any) -> Tensor:
        """Keep the keys; weigh tokens by the logarithm of their sizes."""
        if number == 0:
            self._forget()
            self._patches = key_IHSD.shape[2] - int(self._class_token)
        self._key_ISD = key_IHSD.mean(1)
        if self._proportional and self._size_IS is not None:
            assert more.get("attn_mask") is None, "towers attend without masks"
            more["attn_mask"] = self._size_IS.log().to(query_IHSD.dtype)[:, None, None, :]
        return scaled_dot_product_attention(query_IHSD, key_IHSD, *given, **more)

    def _merge(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the norm of the feed-forward: merge the tensor itself, which the block adds to what comes out."""
        x_ISC, key_ISD = args[0], self._key_ISD
        if key_ISD is None or x_ISC.shape[:2] != key_ISD.shape[:2]:
            raise AerogelError(f"{number + 1}. block of the vision tower: its keys are of other tokens than its feed-forward reads")
        if self._place_IS is None:
            self._place_IS = torch.arange(x_ISC.shape[1], device=x_ISC.device).expand(len(x_ISC), -1)
        size_IS = self._size_IS if self._proportional else None
        size_IS = torch.ones_like(key_ISD[..., 0], dtype=torch.float32) if size_IS is None else size_IS
        pairs = bipartite(key_ISD, self._counts[number], self._class_token)
        whole_ISC, size_IS, stays_IS = merged(x_ISC, size_IS, pairs)
        kept = Kept.of(stays_IS)
        self._place_IS, self._size_IS = kept.rows(self._place_IS), kept.rows(size_IS)
        # In place, shape and all: the block holds this very tensor to add the feed-forward to, under a name of its own in each model.
        x_ISC.set_(kept.rows(whole_ISC))

    def _spread(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After the projector: put rows to the places of the patches that they stand for."""
        if self._place_IS is None:
            return None
        start = int(self._class_token)
        row_IPC = Kept(self._place_IS[:, start:] - start).spread(output, self._patches)
        return marked(row_IPC, ~row_IPC[..., 0].isnan())
