"""Linear layers whose float weight checkpoints hold as (inputs, outputs): Conv1D of transformers, which GPT-2 is made of."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import nn

from aerogel.layers.linear import QuantLinear


class QuantTransposedLinear(QuantLinear):
    """A quantized linear layer in the place of a Conv1D: other readers, who look for nn.Linear, would leave it out."""

    effect: ClassVar[str] = "stands in the place of a Conv1D"

    def describe(self) -> dict[str, Any]:
        """Return nothing: shape and bias are those of the model's own layer."""
        return {}


class TransposedLinear(nn.Linear):
    """A linear layer in the place of a Conv1D; its weight is (outputs, inputs) here and lies the other way round on disk."""

    twin: ClassVar[type[QuantLinear]] = QuantTransposedLinear
    """Class of its quantized twin."""


def as_linears(module: nn.Module) -> None:
    """Put a TransposedLinear in the place of every Conv1D of a module, in place; weights on the meta device stay there."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # where it was never imported, nothing of it is in the module
    if transformers is None:
        return
    for name, part in [(name, part) for name, part in module.named_modules() if isinstance(part, transformers.Conv1D)]:
        _put(module, name, TransposedLinear(part.nx, part.nf, device="meta"), part)


def as_conv1d(module: nn.Module) -> None:
    """Put Conv1D back where it was, in place: in every layer that is not quantized."""
    for name, part in [(name, part) for name, part in module.named_modules() if isinstance(part, TransposedLinear)]:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            _put(module, name, Conv1D(part.out_features, part.in_features), part)


def _put(module: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
    weight: Any = old.weight
    # A copy: the parameter keeps a layout of its own, which kernels and files want contiguous.
    new.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    new.bias = old.bias
    module.set_submodule(name, new.train(old.training))
