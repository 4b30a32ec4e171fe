"""The last product of a language model: hidden states to logits, and the exact best token without reading the whole weight.

Letters in names: B rows of the batch, V vocabulary, C width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from aerogel.kernels.int8 import exact_on_cpu, integer_product

_MANY = 16
"""Share of candidates, one in so many, above which computing all logits is faster."""


class Head:
    """A float head, with int8 codes beside it that find the best token many times as fast.

    The hidden state becomes a row of integer codes too. For every token they give an estimate of its logit and, by Cauchy-Schwarz from the
    norms of what rounding took away from the weight and from the state, a bound on the estimate's error. Only tokens that could still
    win under that bound (a median of 63 among 49,152, measured on SmolLM2) are computed from the float weight, so that the answer is
    the one of all logits. Costs one byte a weight.
    """

    def __init__(self, head: Any) -> None:
        """Prepare the integer codes of a float head on a CPU that sums integers exactly; any other head gives all logits, always."""
        self.head = head
        weight_VC = getattr(head, "weight", None)
        plain = type(head) is torch.nn.Linear and head.bias is None
        self.screens = plain and weight_VC is not None and weight_VC.device.type == "cpu" and exact_on_cpu()
        if self.screens:
            self.weight_VC = head.weight.detach()
            self.codes_VC, self.scale_V = _codes(self.weight_VC)
            rounding_VC = self.weight_VC - self.codes_VC * self.scale_V[:, None]
            self.rounding_V = torch.linalg.vector_norm(rounding_VC, dim=-1, dtype=torch.float32)
            self.norm_V = torch.linalg.vector_norm(self.weight_VC, dim=-1, dtype=torch.float32)

    def logits(self, x_BC: Tensor) -> Tensor:
        """All logits (B, V)."""
        return self.head(x_BC)

    def best(self, x_BC: Tensor) -> Tensor:
        """The tokens (B) with the largest logits."""
        if not self.screens or len(x_BC) != 1:
            return self.logits(x_BC).argmax(dim=-1)
        candidates = self._candidates(x_BC)
        if len(candidates) > len(self.scale_V) // _MANY:
            return self.logits(x_BC).argmax(dim=-1)
        return candidates[linear(x_BC, self.weight_VC[candidates])[0].argmax()][None]

    def _candidates(self, x_BC: Tensor) -> Tensor:
        """Tokens whose logit may be the largest, ascending."""
        x_1C = x_BC.float()
        codes_1C, scale_1 = _codes(x_1C)
        left_1C = x_1C - codes_1C * scale_1
        estimate_V = integer_product(codes_1C, self.codes_VC)[0].float().mul_(self.scale_V).mul_(scale_1)
        error_V = (self.rounding_V * torch.linalg.vector_norm(x_1C)).add_(self.norm_V * torch.linalg.vector_norm(left_1C))
        return (estimate_V + error_V >= (estimate_V - error_V).max()).nonzero()[:, 0]


def _codes(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    scale_R = x_RC.abs().amax(dim=-1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x_RC / scale_R[:, None]).round_().to(torch.int8), scale_R
