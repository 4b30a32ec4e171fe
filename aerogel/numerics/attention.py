"""Scaled dot-product attention written out, so that each operand of its two products can be looked at or changed.

B batch, H heads, L queries, S keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPERANDS = ("query", "key", "probabilities", "value")
"""Operands of the two products, in the order in which they are needed."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    change: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Return what torch's scaled_dot_product_attention does, with `change(operand, tensor)` in the place of every operand.

    Query (B, H, L, D), key and value (B, H, S, D); the arguments have torch's names. Arithmetic is float32, the result has the dtype
    of the query; probabilities are dropped out after they were changed. A query that may see nothing gets zeros.
    """
    query_BHLD, key_BHSD, value_BHSD = change("query", query.float()), change("key", key.float()), value.float()
    if enable_gqa:
        key_BHSD, value_BHSD = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key_BHSD, value_BHSD))
    scores_BHLS = query_BHLD @ key_BHSD.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed_LS = torch.ones(scores_BHLS.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores_BHLS = scores_BHLS.masked_fill(~allowed_LS, -torch.inf)
    if attn_mask is not None:
        scores_BHLS = scores_BHLS.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores_BHLS + attn_mask
    blind_BHL1 = scores_BHLS.amax(-1, keepdim=True) == -torch.inf
    probabilities_BHLS = change("probabilities", scores_BHLS.softmax(-1).masked_fill(blind_BHL1, 0.0))
    if dropout_p:
        probabilities_BHLS = torch.dropout(probabilities_BHLS, dropout_p, train=True)
    return (probabilities_BHLS @ change("value", value_BHSD)).to(query.dtype)
