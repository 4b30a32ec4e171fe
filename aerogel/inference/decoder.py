"""One token at a time through a decoder of the Llama shape, with as few operations as it takes.

A transformers forward spends most of a token's time between the products: in Python, masks, copies of keys and values, rotations of halves.
Here linear layers that share an input are one product, keys and values lie in one tensor that is written in place, and attention reads just
the part that is filled, so that no mask is needed. Nothing is traced or compiled: see docs/speed.md for what that was measured against.

Letters in names: B rows of the batch, T tokens, L cache length, Q query heads, K key-value heads, H all heads of the fused product
(queries, keys, values), D channels of a head, C width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from aerogel.inference.lm_head import Head
from aerogel.kernels import linear as kernels
from aerogel.kernels import sparse_linear
from aerogel.kernels.kernel import Weight
from aerogel.layers.linear import QuantLinear
from aerogel.model.hooks import changes_more_than_the_cache
from aerogel.numerics.quantize import Grid

Product = Callable[[Tensor], Tensor]

_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = (
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    {"qkv_proj", "o_proj"},
)
_MLP = ({"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"})
_PASSIVE = {"rotary_emb", "resid_attn_dropout", "resid_mlp_dropout"}


def refuse(module: Any, length: int) -> str | None:
    """Return why the fast decoder cannot make `length` tokens of a language model, or None where its parts are those of the Llama shape.

    Same parts do not prove the same function; logits must still be compared with the network's own (generate.py does).
    """
    trunk: Any = getattr(module, "model", None)
    missing = [name for name in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(trunk, name)]
    if missing or not hasattr(module, "lm_head"):
        return f"{type(module).__name__} has no {', '.join(missing or ['lm_head'])} where Llama has it"
    for block in trunk.layers:
        if _parts(block) != _BLOCK or _parts(block.self_attn) not in _ATTENTION or _parts(block.mlp) not in _MLP:
            return f"{type(block).__name__} is made of other parts than Llama's block"
    if any(changes_more_than_the_cache(part) for part in module.modules()):
        return "something hangs on its forward that would not be called"
    config = module.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        return f"blocks attend to a window of {window} tokens, fewer than the {length} asked for"
    rotary = (config.rope_parameters or {}).get("rope_type", "default")
    if rotary in ("dynamic", "longrope") or (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return f"{rotary} positions change with the length, or turn a part of the channels only"
    return None


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()} - _PASSIVE


@dataclass(frozen=True)
class _Block:
    """The operations of one block."""

    norm_in: Product
    heads: Product
    norm_heads: tuple[Product, Product] | None
    out: Product
    norm_mlp: Product
    gate_up: Product
    activation: Product
    down: Product


class FastDecoder:
    """The weights of a decoder, packed for `batch` rows, and a cache for `length` tokens."""

    def __init__(self, module: Any, batch: int, length: int) -> None:
        """Pack `module`, for which `refuse` must have found no reason; its own weights stay as they are."""
        trunk, attention = module.model, module.model.layers[0].self_attn
        config: Any = module.config
        weight = trunk.embed_tokens.weight
        self.queries, self.pairs = config.num_attention_heads, config.num_key_value_heads
        self.channels, self.scale = attention.head_dim, attention.scaling
        self.embedding = trunk.embed_tokens
        self.blocks = [_block(block, self.embedding(torch.zeros(batch, dtype=torch.int64, device=weight.device))) for block in trunk.layers]
        self.norm = _norm(trunk.norm)
        self.head = Head(module.lm_head)
        self.rotation = _rotation(trunk.rotary_emb, weight, length, self.queries, self.pairs, self.channels)
        self._shape, self._like = (batch, 2 * self.pairs, length, self.channels), weight
        self.cache: list[Tensor | Any] = [None] * len(self.blocks)
        self.dropped = [0] * len(self.blocks)
        """Positions of the first tokens that the cache of each block does not hold."""

    def fill(self, layers: Sequence[Any]) -> None:
        """Take over what cache layers of transformers hold of the first tokens, block by block; layers that attend themselves are kept."""
        for number, layer in enumerate(layers):
            self.dropped[number] = 0
            if hasattr(layer, "attend"):
                self.cache[number] = layer
                continue
            if not isinstance(self.cache[number], Tensor):
                self.cache[number] = self._like.new_zeros(self._shape)
            cache_BKLD, tokens = self.cache[number], layer.keys.shape[2]
            self.dropped[number] = layer.get_seq_length() - tokens
            cache_BKLD[:, : self.pairs, :tokens] = layer.keys
            cache_BKLD[:, self.pairs :, :tokens] = layer.values

    def hidden(self, tokens_B: Tensor, position: int) -> Tensor:
        """Run the tokens that stand at `position` of their rows and keep their keys and values; returns the normed output (B, C)."""
        cosine_HD, sine_HD = self.rotation[0][position], self.rotation[1][position]
        x_BC = self.embedding(tokens_B)
        for block, cache, dropped in zip(self.blocks, self.cache, self.dropped, strict=True):
            x_BC = x_BC + block.out(self._attend(block, block.norm_in(x_BC), cache, position - dropped, cosine_HD, sine_HD))
            gate, up = block.gate_up(block.norm_mlp(x_BC)).chunk(2, dim=-1)
            x_BC = x_BC + block.down(block.activation(gate) * up)
        return self.norm(x_BC)

    def _attend(self, block: _Block, x_BC: Tensor, cache: Any, place: int, cosine_HD: Tensor, sine_HD: Tensor) -> Tensor:
        heads_BHD = block.heads(x_BC).view(len(x_BC), -1, self.channels)
        if block.norm_heads is not None:
            q, k, v = heads_BHD.split((self.queries, self.pairs, self.pairs), dim=1)
            heads_BHD = torch.cat((block.norm_heads[0](q), block.norm_heads[1](k), v), dim=1)
        # Half a turn of the channels meets a sine whose first half is negative: the pairs (a, b) -> (-b, a) of the rotation.
        heads_BHD = torch.addcmul(heads_BHD * cosine_HD, heads_BHD.roll(self.channels // 2, -1), sine_HD)
        # Queries that share keys are rows of one product: 0.29 ms for 4,096 tokens and 9 heads, and 0.54 ms with each as a head (measured).
        query_BKGD = heads_BHD[:, : self.queries].unflatten(1, (self.pairs, -1))
        key_B1D, value_B1D = (part[:, :, None] for part in heads_BHD[:, self.queries :].split(self.pairs, dim=1))
        if not isinstance(cache, Tensor):
            cache.append(key_B1D, value_B1D)
            return cache.attend(query_BKGD, self.scale).flatten(1)
        cache[:, : self.pairs, place : place + 1], cache[:, self.pairs :, place : place + 1] = key_B1D, value_B1D
        filled = cache[:, :, : place + 1]
        return scaled_dot_product_attention(query_BKGD, filled[:, : self.pairs], filled[:, self.pairs :], scale=self.scale).flatten(1)


def _block(block: Any, like: Tensor) -> _Block:
    attention, mlp = block.self_attn, block.mlp
    heads = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    return _Block(
        norm_in=_norm(block.input_layernorm),
        heads=_product(heads, like),
        norm_heads=(_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        out=_product([attention.o_proj], like),
        norm_mlp=_norm(block.post_attention_layernorm),
        gate_up=_product(gate_up, like),
        activation=_activation(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn),
        down=_product([mlp.down_proj], like),
    )


def _rotation(rotary: Any, like: Tensor, length: int, queries: int, pairs: int, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, H, D) for all heads at once; values pass through with cosine 1 and sine 0."""
    cosine_LD, sine_LD = (part[0] for part in rotary(like, torch.arange(length, device=like.device)[None]))
    turn_L1D = torch.stack((cosine_LD, torch.cat((-sine_LD[:, : channels // 2], sine_LD[:, channels // 2 :]), dim=-1)))[:, :, None]
    still = torch.stack((torch.ones_like(cosine_LD), torch.zeros_like(sine_LD)))[:, :, None]
    both = torch.cat((turn_L1D.expand(-1, -1, queries + pairs, -1), still.expand(-1, -1, pairs, -1)), dim=2)
    return both[0], both[1]


def _norm(norm: Any) -> Product:
    """The norm in few operations where that is the same: float32; 16-bit norms round in between, each in its own way."""
    weight = norm.weight
    if weight.dtype != torch.float32 or not hasattr(norm, "variance_epsilon"):
        return norm
    epsilon, size = norm.variance_epsilon, len(weight)

    def normed(x: Tensor) -> Tensor:
        if x.numel() != size or x.device.type != "cpu":
            return rms_norm(x, weight.shape, weight, epsilon)
        # torch has no kernel of its own for this on a CPU: its ten operations take 15 us, these four take 4 (measured, one row of 576).
        row = x.view(-1)
        return (x * weight).mul_((float(row.dot(row)) / size + epsilon) ** -0.5)

    return normed


def _activation(activation: Product) -> Product:
    return silu if type(activation).__name__ in ("SiLU", "SiLUActivation") else activation


class _Joined:
    """Quantized linear layers that share an input, as one: rows of integer codes under each other (see kernels.kernel.Weight)."""

    def __init__(self, linears: list[QuantLinear]) -> None:
        self.linears = linears
        self.scheme, self.in_features = linears[0].scheme, linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)

    @property
    def bias(self) -> Tensor | None:
        if self.linears[0].bias is None:
            return None
        return torch.cat([linear.bias for linear in self.linears if linear.bias is not None])

    @property
    def g_idx(self) -> Tensor | None:
        return None

    def codes(self) -> Tensor:
        return torch.cat([linear.codes() for linear in self.linears])

    def grid(self) -> Grid:
        grids = [linear.grid() for linear in self.linears]
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        return Grid(torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)

    def input_grid(self) -> Grid | None:
        return None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([linear.dequantized(dtype) for linear in self.linears])


def _product(linears: list[Any], like: Tensor) -> Product:
    """The products of one input with several weights, side by side: one packed kernel where codes can be joined and that is fastest.

    `like` has the rows, the dtype and the device that inputs will have.
    """
    if all(isinstance(linear, QuantLinear) for linear in linears) and _joinable(linears):
        weight: Weight
        weight, cache = (linears[0], linears[0].cache) if len(linears) == 1 else (_Joined(linears), {})
        x_BI = torch.randn(len(like), weight.in_features, device=like.device).to(like.dtype)
        name = kernels.choose(x_BI, weight, cache)
        if name not in ("reference", "sliced"):
            return kernels.packed(name, weight, x_BI, cache).forward
    elif (sparse := sparse_linear.product(linears, like)) is not None:
        return sparse
    return linears[0] if len(linears) == 1 else lambda x: torch.cat([linear(x) for linear in linears], dim=-1)


def _joinable(linears: list[QuantLinear]) -> bool:
    first = linears[0]
    if len(linears) == 1:
        return True
    same = all(linear.scheme == first.scheme and (linear.bias is None) == (first.bias is None) for linear in linears)
    static = first.scheme.inputs is not None and not first.scheme.inputs.dynamic
    whole = first.grid().scale.ndim == 2 and first.grid().outer is None
    return same and whole and not static and all(linear.g_idx is None for linear in linears)
