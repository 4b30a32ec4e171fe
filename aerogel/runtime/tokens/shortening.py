"""Tokens are dropped before some decoder blocks; later blocks, the cache and later tokens follow.

Positions stay as they are, unless a rule says that what it leaves is a prompt of its own.

B rows, N positions of a forward, K of them that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from aerogel.errors import AerogelError
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.signature import arguments_of
from aerogel.model.hooks import CacheOnlyHook, OwnedHook
from aerogel.model.kv_cache import cache_in, cache_layer
from aerogel.model.network import Network
from aerogel.runtime.kv_cache.layer import QuantizedCacheLayer
from aerogel.runtime.token_types import SPECIAL, VISION, Vocabulary
from aerogel.runtime.tokens.cache_layer import ShortenedLayer, held_with, shortened
from aerogel.runtime.tokens.decoder import Decoder
from aerogel.runtime.tokens.deepstack import DeepStack
from aerogel.runtime.tokens.eviction import Eviction, first_positions
from aerogel.runtime.tokens.kept import Kept, cut_arguments, cut_mask
from aerogel.runtime.tokens.scores import QueryKey, behind_blocks, of_block, watching
from aerogel.runtime.tokens.separators import at_separators, separators
from aerogel.runtime.tokens.stage import Observe, Positions, Rule, Stage
from aerogel.runtime.tokens.vision_tower import TowerPass, VisionTower


@dataclass
class _Forward:
    """A forward that is under way."""

    kind_BN: Tensor
    inputs: Mapping[str, Any]
    separator_BN: Tensor | None = None
    kept: Kept | None = None
    watched: dict[int, QueryKey] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)
    """Places of watched blocks' caches that were filled before, where these have room for more."""
    memory: dict[str, Any] = field(default_factory=dict)
    layers: dict[int, ShortenedLayer] = field(default_factory=dict)
    """Layers of the cache that were made to hold fewer positions than they have seen, by block."""
    first_B: Tensor | None = None
    """First positions of the rows, where something is evicted."""


class Shortening:
    """Rules on their way through a network's forwards: by the number of the block that they act before."""

    def __init__(
        self,
        network: Network,
        decoder: Decoder,
        rules: Mapping[int, Rule],
        watch: Sequence[int] = (),
        drops_text: bool = False,
        evict: Eviction | None = None,
        tower: VisionTower | None = None,
        observe: Observe | None = None,
    ) -> None:
        """Prepare rules; `watch` are the blocks whose queries and keys they read, `drops_text` says that they drop tokens of text.

        `evict` forgets positions of the cache that were computed; `tower` is the vision tower whose grids or attention the rules read;
        `observe` is called with the queries and keys of each block before the last rule, which are not kept.
        """
        self._observe, self._observed = observe, range(max(rules, default=0) if observe is not None else 0)
        self.evict, self._tower = evict, tower
        self.decoder, self.rules, self.watch, self.drops_text = decoder, rules, tuple(watch), drops_text
        self.lengths: tuple[int, ...] = ()
        """Positions that each block computed in the last forward of more than one position."""
        self.left: Kept | None = None
        """Positions that were left behind the last block in that forward; None where all were."""
        self.kind_BN: Tensor | None = None
        """Types of the tokens of that forward; separators between those of an image are special tokens."""
        self.dropped = 0
        """Positions that were not computed so far, over all rows and blocks."""
        self._network, self._vocabulary = network, Vocabulary.of(network)
        self._names = arguments_of(network.module)
        self._separators = separators(network, decoder) if self._vocabulary.vision else ()
        self._guard = ForwardGuard()
        self._forward: _Forward | None = None
        self._tower_pass: TowerPass | None = None
        self._deepstack = DeepStack()

    @contextmanager
    def on(self) -> Iterator[Shortening]:
        """Act on every forward for a while; afterwards the network is what it was.

        Raises AerogelError where others do so already.
        """
        module, self._deepstack = self._network.module, DeepStack()
        hook = CacheOnlyHook if self.evict is None or self.evict.prompts_only else OwnedHook
        if _on(self._network):
            raise AerogelError("a policy that drops tokens or evicts them from the cache is on already; leave one of them out")

        def before(part: nn.Module, act: Callable[..., Any]) -> None:
            stack.callback(part.register_forward_pre_hook(hook(self, act), with_kwargs=True).remove)

        def after(part: nn.Module, act: Callable[..., Any], always: bool = False) -> None:
            stack.callback(part.register_forward_hook(hook(self, act), always_call=always).remove)

        with ExitStack() as stack:
            before(module, self._begin)
            after(module, self._end, always=True)
            before(module.get_submodule(self.decoder.module), self._deepstack.take)
            if self._separators:
                before(module.get_submodule(self.decoder.module), self._separate)
            for number, block in enumerate(self.decoder.parts(self._network)):
                before(block, partial(self._enter, number))
                before(module.get_submodule(self.decoder.attentions[number]), partial(self._store, number))
                after(block, partial(self._leave, number))
            watch = range(self.decoder.depth) if self.evict is not None and self.evict.watches else {*self.watch, *self._observed}
            named = {number: self.decoder.attentions[number] for number in watch}
            stack.enter_context(watching(self._network, named, self._see))
            if self._tower is not None:
                stack.enter_context(self._tower.watching(self._network, self._see_tower))
            yield self

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._guard.enter(module)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        self._forward = _Forward(self._vocabulary.kinds(inputs), inputs)

    def _end(self, *_: Any) -> None:
        if self._guard.leave():
            self._forward = self._tower_pass = None

    def _separate(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the language model: rules do not choose among separators, so these are image tokens no more."""
        forward, embedded_BNC = self._under_way, kwargs.get("inputs_embeds")
        if isinstance(embedded_BNC, Tensor) and embedded_BNC.shape[1] > 1:
            vectors = [self._network.module.get_parameter(name) for name in self._separators]
            forward.separator_BN = at_separators(embedded_BNC, forward.kind_BN == VISION, vectors)
            forward.kind_BN = forward.kind_BN.masked_fill(forward.separator_BN, SPECIAL)

    def _see_tower(self, seen: TowerPass) -> None:
        self._tower_pass = seen

    def _see(self, number: int, seen: QueryKey) -> None:
        forward = self._under_way
        filled = forward.filled.get(number)
        here = seen if filled is None else seen.first_keys(filled + seen.query_BHLD.shape[2])
        if number in self.watch:
            forward.watched[number] = here
        if self._observe is not None and number in self._observed:
            self._observe(Positions(**self._positions(number, len(seen.query_BHLD))), here)
        if self.evict is not None and (layer := forward.layers.get(number)) is not None and layer.seen == forward.kind_BN.shape[1]:
            self.evict.read(layer, seen)

    @property
    def _under_way(self) -> _Forward:
        if self._forward is None:
            raise AerogelError("a decoder block runs outside of the model's own forward, while a policy that drops tokens is on")
        return self._forward

    def _enter(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a block: drop what its rule does not keep, and cut what the block is given to what is left."""
        forward = self._under_way
        total = forward.kind_BN.shape[1]
        hidden_BKC = args[0] if args else kwargs["hidden_states"]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        layer = cache_layer(cache_in(args, kwargs), self.decoder.places[number])
        if number == 0 and total > 1:
            self.lengths = ()
        if total > 1 and number in self.rules:
            hidden_BKC = self._select(number, block, hidden_BKC, (args[1:], rest), layer)
        if total > 1:
            self.lengths += (hidden_BKC.shape[1],)
            self.dropped += 0 if forward.kept is None else forward.kept.missing(total)
        if self.evict is not None:
            forward.first_B = first_positions(_mask(rest), len(hidden_BKC), hidden_BKC.device)
            if isinstance(layer, ShortenedLayer):
                self.evict.before(layer, forward.first_B)
        if forward.kept is None and not isinstance(layer, ShortenedLayer) and self.evict is None:
            return None
        return (hidden_BKC, *args[1:]), self._cut(forward, layer, rest, hidden_BKC)

    def _select(self, number: int, block: nn.Module, hidden_BKC: Tensor, given: tuple[Any, dict[str, Any]], layer: Any) -> Tensor:
        """Let a block's rule act; returns the hidden states of what is left."""
        forward, seen = self._under_way, 0 if layer is None else int(layer.get_seq_length())
        total = forward.kind_BN.shape[1]
        here = forward.kept or Kept.all(len(hidden_BKC), total, hidden_BKC.device)

        def alone() -> dict[str, Any]:
            rest = given[1]
            if (mask := rest.get("attention_mask")) is not None:  # of the forward's own positions alone
                rest = rest | {"attention_mask": mask[..., seen : seen + total]}
            return self._cut(forward, None, rest, hidden_BKC)

        def ahead(later: int) -> QueryKey:
            parts, own = self.decoder.parts(self._network), alone()
            self.dropped -= (later - number) * hidden_BKC.shape[0] * hidden_BKC.shape[1]
            behind_BKC = behind_blocks(parts[number:later], (hidden_BKC, *given[0]), own)
            return of_block(parts[later], (behind_BKC, *given[0]), own)

        stage = Stage(
            **self._positions(number, len(hidden_BKC)),
            hidden_BKC=hidden_BKC,
            watched=forward.watched,
            probe=lambda: of_block(block, (hidden_BKC, *given[0]), alone()),
            ahead=ahead,
            deeper=lambda: self._deepstack.side_by_side(hidden_BKC, here),
            before=seen,
            final_norm=self.decoder.final_norm(self._network),
            video_BN=self._vocabulary.of_video(forward.inputs["input_ids"]),
            separator_BN=torch.zeros_like(forward.kind_BN, dtype=torch.bool) if forward.separator_BN is None else forward.separator_BN,
            tower=self._tower_pass,
        )
        selection = self.rules[number](stage)
        if selection is None:
            return hidden_BKC
        left = Kept.of(selection.keep_BK if here.real_BK is None else selection.keep_BK & here.real_BK)
        forward.kept = here.then(left).renumbered() if selection.renumber else here.then(left)
        return left.rows(hidden_BKC if selection.hidden_BKC is None else selection.hidden_BKC)

    def _positions(self, number: int, rows: int) -> dict[str, Any]:
        """Return the arguments of Positions at a block."""
        forward = self._under_way
        kept = forward.kept or Kept.all(rows, forward.kind_BN.shape[1], forward.kind_BN.device)
        return {
            "block": number, "kind_BK": kept.rows(forward.kind_BN), "kept": kept, "kind_BN": forward.kind_BN, "inputs": forward.inputs,
            "memory": forward.memory,
        }  # fmt: skip

    def _cut(self, forward: _Forward, layer: Any, rest: dict[str, Any], hidden_BKC: Tensor) -> dict[str, Any]:
        """The other arguments of a block, cut to what is left of a forward."""
        total = forward.kind_BN.shape[1]
        kept = forward.kept or Kept.all(len(hidden_BKC), total, hidden_BKC.device)
        seen = 0 if layer is None else layer.get_seq_length()
        cut = rest if forward.kept is None else cut_arguments(rest, kept)
        mask = _mask(rest)
        key_BS, real_BS = held_with(layer, kept)
        mask = cut_mask(mask, kept, key_BS, real_BS, before=seen)
        if self.evict is not None and total > 1 and forward.first_B is not None and key_BS.ndim == 2:
            mask = self.evict.narrowed(mask, kept.at_BK + seen, key_BS, forward.first_B)
        return cut | {"attention_mask": mask}

    def _store(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention: tell the layer of the cache which positions come."""
        forward = self._under_way
        place, cache = self.decoder.places[number], cache_in(args, kwargs)
        layer = cache_layer(cache, place)
        if isinstance(layer, StaticLayer) and (number in self.watch or number in self._observed) and forward.kind_BN.shape[1] > 1:
            forward.filled[number] = int(layer.cumulative_length)
        if cache is None or (forward.kept is None and not isinstance(layer, ShortenedLayer) and self.evict is None):
            return
        rows, total = forward.kind_BN.shape
        device = forward.kind_BN.device
        layer = cache.layers[place] = shortened(layer, rows, device)
        if self.evict is not None and isinstance(layer, QuantizedCacheLayer | StaticLayer):
            raise AerogelError(
                "positions are evicted from a dynamic cache in 16 bits only; leave cache_implementation out, and the policy that quantizes "
                "the cache"
            )
        layer.expect(forward.kept or Kept.all(rows, total, device), total)
        forward.layers[number] = layer

    def _leave(self, number: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a block: add features of deeper layers of the vision tower; after the last one, put what is left back to its places."""
        forward = self._under_way
        if self.evict is not None and forward.first_B is not None and number in forward.layers and forward.kind_BN.shape[1] > 1:
            self.evict.after(forward.layers[number], forward.first_B)
        if number == self.decoder.depth - 1 and forward.kind_BN.shape[1] > 1:
            self.left, self.kind_BN = forward.kept, forward.kind_BN
            for layer in forward.layers.values() if self.evict is not None and forward.kept is not None else ():
                self.evict.finish(layer, forward.kept, forward.kind_BN.shape[1])  # type: ignore[union-attr,arg-type]
        hidden_BKC = output[0] if isinstance(output, tuple) else output
        changed_BKC = self._deepstack.add(number, hidden_BKC, forward.kept)
        if number == self.decoder.depth - 1 and forward.kept is not None:
            changed_BKC = forward.kept.spread(changed_BKC, forward.kind_BN.shape[1])
        if changed_BKC is hidden_BKC:
            return None
        return (changed_BKC, *output[1:]) if isinstance(output, tuple) else changed_BKC


def _mask(arguments: Mapping[str, Any]) -> Tensor | None:
    """The attention mask of a block; raises AerogelError for one of another shape than (B, H, N, L)."""
    mask: Tensor | None = arguments.get("attention_mask")
    if mask is not None and mask.ndim != 4:
        raise AerogelError("tokens are dropped under attention masks of four axes; open the model with attn_implementation='sdpa'")
    return mask


def drops_text(network: Network) -> bool:
    """Return True while a policy is on that drops tokens of text: the logits at these are NaN."""
    return any(one.drops_text for one in _on(network))


def evicts(network: Network) -> bool:
    """Return True while a policy is on that evicts positions from the cache."""
    return any(one.evict is not None for one in _on(network))


def trims(network: Network) -> bool:
    """Return True while a policy is on that evicts positions in every forward, not behind a prompt alone."""
    return any(one.evict is not None and not one.evict.prompts_only for one in _on(network))


def _on(network: Network) -> list[Shortening]:
    """What is on."""
    owners = (hook.owner for hook in network.module._forward_pre_hooks.values() if isinstance(hook, OwnedHook))
    return [owner for owner in owners if isinstance(owner, Shortening)]
