"""The attentions of a model: which modules call scaled_dot_product_attention, how to replace it, and what attention each token receives.

Legend: B rows, H heads, L or Q queries, S keys, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network

CHUNK_SCORES = 2**25
"""The most entries of attention maps that are held at once: 128 MiB of float32."""

Attend = Callable[..., Tensor]
"""A function with the arguments of scaled_dot_product_attention."""


class _Answer(TorchFunctionMode):
    """Lets every scaled_dot_product_attention be answered by somebody else."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._attend if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def answered(attend: Attend) -> TorchFunctionMode:
    """Let `attend` answer every scaled_dot_product_attention for a while."""
    return _Answer(attend)


def attentions(network: Network, call: Call) -> tuple[str, ...]:
    """Return the full names of the modules that call scaled_dot_product_attention themselves, in the order of a forward of `call`."""
    running: list[str] = []
    found: dict[str, None] = {}

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        found[running[-1]] = None
        return scaled_dot_product_attention(*args, **kwargs)

    with ExitStack() as stack:
        for name, module in network.module.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: _left(running), always_call=True).remove)
        with _Answer(seen):
            network.run(call)
    return tuple(found)


def require_torch_attention(network: Network) -> None:
    """Raise AerogelError where every part of the network says that its attention is another than scaled_dot_product_attention."""
    configs = [getattr(module, "config", None) for module in network.module.modules()]
    named = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    if named and "sdpa" not in named:
        raise AerogelError(
            f"0 modules of this model call scaled_dot_product_attention, its attention is {' and '.join(sorted(map(repr, named)))}; "
            "open the model with attn_implementation='sdpa', or leave this step out"
        )


@contextmanager
def attending(network: Network, names: Iterable[str], attend: Callable[[str], Attend], cache_only: bool = False) -> Iterator[None]:
    """Let `attend(name)` answer the attention of each named module for a while, also where a block is run by itself.

    `cache_only` is that of `patch_forward`.
    """
    modules = {name: network.module.get_submodule(name) for name in names}
    answers = {module: partial(_forward, module.forward, attend(name)) for name, module in modules.items()}
    with patch_forward(answers, cache_only=cache_only):
        yield


def _forward(own: Callable[..., Any], attend: Attend, *args: Any, **kwargs: Any) -> Any:
    with _Answer(attend):
        return own(*args, **kwargs)


def _left(running: list[str]) -> None:
    running.pop()  # nothing is returned: a hook's answer would take the output's place


def attention_received(query_BHLD: Tensor, key_BHSD: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return the attention that each key gets (B, S): mean over heads, sum over queries; few queries' maps are held at a time.

    `attn_mask` and `scale` are those of torch's scaled_dot_product_attention.
    """
    batch, heads, queries, _ = query_BHLD.shape
    keys = key_BHSD.shape[-2]
    scale = query_BHLD.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(*attn_mask.shape[:-2], queries, keys)
    sum_BS = torch.zeros(batch, keys, device=query_BHLD.device)
    length = max(1, CHUNK_SCORES // (batch * heads * keys))
    for start in range(0, queries, length):
        score_BHLS = query_BHLD[..., start : start + length, :] * scale @ key_BHSD.transpose(-2, -1)
        if mask is not None:
            those = mask[..., start : start + length, :]
            score_BHLS = score_BHLS.masked_fill(~those, -torch.inf) if those.dtype == torch.bool else score_BHLS + those
        sum_BS += score_BHLS.softmax(-1, dtype=torch.float32).sum((1, 2))
    return sum_BS / heads


def received_from(probability_BHQS: Tensor, asking_BQ: Tensor, cache: Any, layer: int) -> Tensor:
    """Return the attention that each position of a forward received (B, Q): mean over heads, sum over the queries that `asking_BQ` counts.

    `probability_BHQS` are a layer's attention probabilities, S the positions of its key-value cache (None without one).
    """
    received_BS = torch.einsum("bhqk,bq->bk", probability_BHQS.float(), asking_BQ) / probability_BHQS.shape[1]
    length, queries = received_BS.shape[1], asking_BQ.shape[1]
    # The forward's own positions come after what was read before, and before what a static cache has room for; a sliding window ends there.
    end = torch.as_tensor(length if cache is None else cache.get_seq_length(layer)).clamp(max=length)
    place_Q = torch.arange(queries, device=asking_BQ.device) - queries + end
    return received_BS[:, place_Q]


@contextmanager
def with_probabilities(attention: Any, hook: Callable[..., None]) -> Iterator[None]:
    """Call a forward hook (with keyword arguments) after a transformers attention, which returns its probabilities meanwhile."""
    config = attention.config
    before = config._attn_implementation_internal
    handle = attention.register_forward_hook(hook, with_kwargs=True)
    try:
        config._attn_implementation_internal = "eager"  # the only implementation that returns them
        yield
    finally:
        config._attn_implementation_internal = before
        handle.remove()
