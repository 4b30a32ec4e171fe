"""The loss of reconstruction: how far a module with other weights is from what is wanted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aerogel.model.samples import Samples, reconstruction_error


def error_with(module: nn.Module, weights: Mapping[str, Tensor], samples: Samples, chosen: Sequence[int]) -> Tensor:
    """Return the reconstruction error of the chosen samples when these parameters, by name in the module, stand in place of its own.

    Gradients reach the given ones only.
    """
    fixed = {name: parameter.detach() for name, parameter in module.named_parameters() if name not in weights}
    errors = [
        share * reconstruction_error(functional_call(module, {**fixed, **weights}, call.args, call.kwargs), wanted)
        for call, wanted, share in samples.take(chosen)
    ]
    return torch.stack(errors).sum()
