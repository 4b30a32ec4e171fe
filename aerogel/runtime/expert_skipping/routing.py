"""Between router and experts: a rule says which token-expert assignments are kept, the others get an index past the last expert.

L layers with routed experts, E experts, K of them a token, B rows, S positions, T = B * S tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.experts import ExpertList
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.signature import arguments_of
from aerogel.model.network import Network
from aerogel.model.structure import moe
from aerogel.runtime.attention import received_from, with_probabilities
from aerogel.runtime.expert_skipping import backend
from aerogel.runtime.token_types import PADDING, SPECIAL, Vocabulary

Bypass = Literal["zero", "identity"]


@dataclass(frozen=True)
class Shape:
    """Shape of an MoE model that a policy fits; any other model refuses it."""

    layers: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Routed:
    """Routing of one layer in one forward, as a rule sees it."""

    layer: int
    x_TH: Tensor
    """Input of the experts, normalised."""
    share_TK: Tensor
    """The router's weights of the chosen experts, float32, summing to one; scaling factors of a family are divided out."""
    index_TK: Tensor
    kind_BS: Tensor
    decoding: bool
    """True where each row has one position, as in decoding."""
    received_BS: Tensor | None
    """Attention that each position received, as a mean over the heads; where a rule asks for it and it is no token being written."""

    @property
    def kind_T(self) -> Tensor:  # noqa: N802
        """Kind of each token."""
        return self.kind_BS.reshape(-1)


Rule = Callable[[Routed], Tensor]
"""Returns kept_TK, True where an assignment is kept. Its values at padding are ignored: padding has no expert."""


@dataclass
class Skipping:
    """A rule on its way through a network's forwards."""

    rule: Rule
    vocabulary: Vocabulary
    renormalise: bool = False
    """Scale kept weights to the sum of all."""
    keep_top1: bool = False
    """Keep the best expert of each token."""
    protect: bool = True
    """Keep all experts of special tokens."""
    bypass: Bypass = "zero"
    """Output for a token of which all assignments are dropped: zero, or the input of the experts."""
    kind_BS: Tensor | None = field(default=None, init=False)
    """Kinds of the tokens of the forward at hand; None outside of one."""
    received: dict[int, Tensor] = field(default_factory=dict, init=False)
    _guard: ForwardGuard = field(default_factory=ForwardGuard, init=False)

    def look(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: tell its tokens apart."""
        self._guard.enter(module)
        self.kind_BS = self.vocabulary.kinds(dict(zip(names, args, strict=False)) | kwargs)
        self.received.clear()

    def forget(self, *_: Any) -> None:
        """After a forward, also one that failed: what comes next has tokens of its own."""
        if self._guard.leave():
            self.kind_BS = None
            self.received.clear()

    def attended(self, layer: int, module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After a layer's attention: keep what each position of the forward received, summed over all that are no padding."""
        probability_BASS = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if probability_BASS is None:
            raise AerogelError("this attention does not give its probabilities, which the rule needs; leave that part of the rule out")
        if probability_BASS.shape[-2] > 1:
            assert self.kind_BS is not None, "the forward's own hook comes first"
            asks_BS = (self.kind_BS != PADDING).float()
            self.received[layer] = received_from(probability_BASS, asks_BS, kwargs.get("past_key_values"), module.layer_idx)

    def route(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a layer's experts: drop what the rule does not keep."""
        _require_backend(module)
        x_TH, index_TK, weight_TK = args
        kind_BS = self.kind_BS
        if kind_BS is None:
            raise AerogelError(
                f"the experts of layer {layer} run outside of the model's own forward, which tells a policy that skips experts what the "
                "tokens are: call the whole model, or take the policy off"
            )
        if kind_BS.numel() != len(index_TK):
            raise AerogelError(f"{len(index_TK)} tokens reached the experts of layer {layer}, but the forward has another number")
        total_T1 = weight_TK.float().sum(-1, keepdim=True)
        share_TK = weight_TK.float() / total_T1.clamp(min=torch.finfo(torch.float32).tiny)
        routed = Routed(layer, x_TH, share_TK, index_TK, kind_BS, kind_BS.shape[1] == 1, self.received.get(layer))
        kept_TK = self._kept(routed)
        return x_TH, index_TK.masked_fill(~kept_TK, moe.count_of(module)), self._weights(weight_TK, kept_TK)

    def give_input(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """After a layer's experts: return their input for a token of which all assignments are dropped."""
        dropped_T1 = (args[1] >= moe.count_of(module)).all(-1, keepdim=True)
        return torch.where(dropped_T1, args[0], output)

    def _kept(self, routed: Routed) -> Tensor:
        kept_TK = self.rule(routed)
        kind_T1 = routed.kind_T[:, None]
        if self.keep_top1:
            kept_TK = kept_TK.scatter(1, routed.share_TK.argmax(-1, keepdim=True), True)
        if self.protect:
            kept_TK = kept_TK | (kind_T1 == SPECIAL)
        return kept_TK & (kind_T1 != PADDING)

    def _weights(self, weight_TK: Tensor, kept_TK: Tensor) -> Tensor:
        left_TK = weight_TK.masked_fill(~kept_TK, 0.0)
        if not self.renormalise:
            return left_TK
        sums_T1 = left_TK.float().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (left_TK.float() * (weight_TK.float().sum(-1, keepdim=True) / sums_T1)).to(weight_TK.dtype)


def experts_of(network: Network) -> dict[str, nn.Module]:
    """The modules that run routed experts, by full name in the order of the layers; raises AerogelError when there is none."""
    blocks = tuple(f"{name}." for name in network.blocks())
    found = {name: part for name, part in moe.routed_experts(network.module).items() if name.startswith(blocks)}
    if not found:
        raise AerogelError(f"this {network.family.name} model has no routed experts; remove this step")
    return found


def router_of(network: Network, experts: str) -> nn.Module:
    """The router of the experts with this full name."""
    return moe.router_of(network.module, experts)


def shape_of(network: Network) -> Shape:
    """Layers with routed experts, experts of each, and how many a token goes to."""
    found = experts_of(network)
    name, first = next(iter(found.items()))
    return Shape(len(found), moe.count_of(first), moe.top_k_of(network.module, name, network.config))


@contextmanager
def skipping(network: Network, skip: Skipping, attention: bool = False) -> Iterator[Skipping]:
    """Let a rule act on every forward; afterwards the network is what it was, its choice of experts implementation too.

    With `attention` the rule is told what each position received; attention is then computed step by step (`eager`). Raises
    AerogelError when the network has no routed experts, and in a forward whose implementation of experts was changed meanwhile.
    """
    found = experts_of(network)
    skip.vocabulary.put_on(network.device)
    with ExitStack() as stack:
        hook = partial(skip.look, arguments_of(network.module))
        stack.callback(network.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(network.module.register_forward_hook(skip.forget, always_call=True).remove)
        fused = [module for module in found.values() if not isinstance(module, ExpertList)]
        for config in {id(module.config): module.config for module in fused}.values():
            stack.enter_context(_set(config, "_experts_implementation_internal", backend.NAME))
        for layer, (name, module) in enumerate(found.items()):
            stack.callback(module.register_forward_pre_hook(partial(skip.route, layer)).remove)
            if skip.bypass == "identity":
                stack.callback(module.register_forward_hook(skip.give_input).remove)
            if attention:
                stack.enter_context(with_probabilities(_attention_of(network, name), partial(skip.attended, layer)))
        yield skip


def _attention_of(network: Network, experts: str) -> nn.Module:
    """The attention of the block that has the experts with this full name."""
    block = next(name for name in network.blocks() if experts.startswith(f"{name}."))
    return moe.attention_before(network.module, block, experts)


@contextmanager
def _set(owner: Any, key: str, value: Any) -> Iterator[None]:
    before = getattr(owner, key)
    setattr(owner, key, value)
    try:
        yield
    finally:
        setattr(owner, key, before)


def _require_backend(module: nn.Module) -> None:
    chosen = None if isinstance(module, ExpertList) else module.config._experts_implementation  # type: ignore[union-attr]
    if chosen not in (None, backend.NAME):
        raise AerogelError(
            f"the experts implementation was set to {chosen!r} while a policy that skips experts is on; it would compute with experts that "
            f"do not exist: set it back to {backend.NAME!r}, or take the policy off"
        )
