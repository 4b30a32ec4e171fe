"""Base of policies that quantize the key-value cache: which attentions, which of them stay in 16 bits, and what that costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model import kv_cache
from aerogel.model.calls import Call
from aerogel.model.kv_cache import CachedAttention, Replace
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence
from aerogel.options import Count, CountOrZero
from aerogel.runtime.kv_cache.layer import MakeStores, quantized
from aerogel.runtime.kv_cache.stores import Store
from aerogel.runtime.policy_state import PolicyState, by_name

_ROWS = 256
"""Rows of logits that are compared at once."""


@dataclass(frozen=True, eq=False)
class KVCacheState(PolicyState):
    """The attentions whose keys and values are quantized."""

    attentions: tuple[str, ...]
    """Full names."""
    kept: tuple[str, ...] = ()
    """Attentions that stay in 16 bits because they lose most."""
    losses: tuple[float, ...] = ()
    """KL divergence, in nats a token, with only one attention quantized: of `attentions` and then of `kept`; empty if not measured."""
    scales: Mapping[str, Tensor] = by_name()
    """Static scales `attention.k_scale` and `attention.v_scale`, also of attentions left in 16 bits: engines may ask for them."""


@dataclass(frozen=True)
class KVCachePolicy(RuntimePolicy[KVCacheState]):
    """Stores keys and values in few bits; every call that brings a cache reads them back as they were stored."""

    state: ClassVar[type[PolicyState]] = KVCacheState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "kv_cache"})
    exact_prompt: ClassVar[bool] = False
    """True where the forward that fills an empty cache attends to its keys and values before they are rounded."""

    ignore: tuple[str, ...] = field(default=(), kw_only=True)
    """Attentions to leave in 16 bits: globs on full dotted names, `re:` patterns or class names."""
    keep: CountOrZero = field(default=0, kw_only=True)
    """Further attentions to leave in 16 bits: those that lose most, measured one by one on the calibration data."""
    judged: Count = field(default=4096, kw_only=True)
    """Tokens on which that is measured."""

    @abstractmethod
    def stores(self, scales: Mapping[str, Tensor]) -> tuple[Store, Store]:
        """Return empty stores of an attention's keys and values; `scales` are its `k_scale` and `v_scale`, if it has static ones."""

    def fits(self, channels: int) -> bool:
        """Return False where heads of so many channels cannot be stored."""
        return True

    def measured(self, network: Network, modules: Mapping[str, int], calls: Sequence[Call]) -> dict[str, Tensor]:
        """Measure static scales, by full name; none unless a policy says so."""
        return {}

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Once to find the attentions and their ranges; attentions that are kept are judged one by one, about thirty of them."""
        judged = 31.0 * min(self.judged, size.tokens) if self.keep else 0.0
        return CostEstimate(model_tokens=size.at_once + size.tokens + judged)

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> KVCacheState:
        """Find the attentions, measure scales, and choose what is kept; raises AerogelError where nothing can be quantized."""
        with cache_dequantized(network.module):
            found = kv_cache.cache_modules(network, calls[0])
            modules = self._chosen(network, found)
            scales = self.measured(network, {name: one.place for name, one in found.items()}, calls)
            if not self.keep:
                return KVCacheState(tuple(modules), scales=scales)
            losses = self._judge(network, modules, scales, calls)
        kept = sorted(losses, key=losses.__getitem__)[-self.keep :]
        names = [name for name in modules if name not in kept]
        return KVCacheState(
            tuple(names),
            tuple(name for name in modules if name in kept),
            tuple(losses[name] for name in (*names, *(name for name in modules if name in kept))),
            scales,
        )

    @contextmanager
    def on(self, network: Network, state: KVCacheState) -> Iterator[None]:
        """Let calls that bring a cache store their keys and values in few bits."""
        modules = self._required(network, state.attentions)
        with kv_cache.cache_layers(network, modules, partial(self._replacing, state.scales)):
            yield

    def _replacing(self, scales: Mapping[str, Tensor], name: str) -> Replace:
        own = {part: scales[f"{name}.{part}"] for part in ("k_scale", "v_scale") if f"{name}.{part}" in scales}
        make: MakeStores = partial(self.stores, own)
        return partial(quantized, make=make, exact_prompt=self.exact_prompt)

    def _required(self, network: Network, names: Iterable[str]) -> dict[str, int]:
        """The places of these modules in a cache; raises AerogelError where one has none, or is taken."""
        places = kv_cache.places(network)
        if absent := [name for name in names if name not in places]:
            raise AerogelError(f"{name_of(self)} was calibrated for a model with {absent[0]}, which this one lacks: calibrate it again")
        if taken := [name for name in names if kv_cache.hooks_of(network.module.get_submodule(name))]:
            raise AerogelError(f"{name_of(self)}: the cache of {taken[0]} is quantized by another policy; leave one of them out")
        return {name: places[name] for name in names}

    def _chosen(self, network: Network, found: Mapping[str, CachedAttention]) -> dict[str, int]:
        ignore = network.expand_patterns(self.ignore)
        chosen = {name: one for name, one in found.items() if not matches(name, ignore, network.module.get_submodule(name))}
        if len(chosen) <= self.keep:
            raise AerogelError(
                f"{name_of(self)}: {len(found)} attentions have a cache, {len(found) - len(chosen)} are ignored and {self.keep} "
                "are to be kept; expected at least one to be left"
            )
        for name, one in chosen.items():
            if wrong := sorted(width for width in one.channels if not self.fits(width)):
                raise AerogelError(f"{name_of(self)}: the heads of {name} have {wrong[0]} channels, which its options do not divide")
        return self._required(network, chosen)

    def _judge(self, network: Network, modules: Mapping[str, int], scales: Mapping[str, Tensor], calls: Sequence[Call]) -> dict[str, float]:
        """The KL divergence from the model's own predictions with the cache of one attention quantized."""
        totals, seen = dict.fromkeys(modules, 0.0), 0
        for call in calls:
            theirs = self._logits(network, call)
            for name, place in modules.items():
                with kv_cache.cache_layers(network, {name: place}, partial(self._replacing, scales)):
                    totals[name] += _divergence(theirs, self._logits(network, call))
            seen += theirs.shape[0] * theirs.shape[1]
            if seen >= self.judged:
                break
        return {name: total / seen for name, total in totals.items()}

    def _logits(self, network: Network, call: Call) -> Tensor:
        """Logits (B, T, V) of a call whose second half reads the first from the cache, where it is of token ids only."""
        ids_BT = call.kwargs.get("input_ids")
        if not self.exact_prompt or set(call.kwargs) - {"input_ids", "use_cache"} or call.args or ids_BT is None:
            logits: Tensor = network.run(kv_cache.with_cache(call)).logits
            return logits
        first_BT, second_BT = ids_BT.tensor_split(2, dim=1)
        filled = network.run(Call((), {"input_ids": first_BT, "use_cache": True}))
        rest = network.run(Call((), {"input_ids": second_BT, "use_cache": True, "past_key_values": filled.past_key_values}))
        return torch.cat([filled.logits, rest.logits], dim=1)


def _divergence(theirs_BTV: Tensor, ours_BTV: Tensor) -> float:
    """The sum over tokens of KL(theirs || ours)."""
    pairs: Any = zip(theirs_BTV.flatten(0, 1).split(_ROWS), ours_BTV.flatten(0, 1).split(_ROWS), strict=True)
    return sum(kl_divergence(p_RV, q_RV) * len(q_RV) for p_RV, q_RV in pairs)
