"""Activations of diffusers' transformers that the product before them computes on the way, or that one pass does; elsewhere they stay."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, GELU
from torch import Tensor, nn

from aerogel.kernels import onepass
from aerogel.layers.linear import QuantLinear


class FusedGELU(GELU):
    """diffusers' GELU behind a linear, which it leaves to the kernel of a quantized one."""

    def __init__(self, own: GELU) -> None:
        nn.Module.__init__(self)  # GELU's own would make a linear
        self.proj, self.approximate = own.proj, own.approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project and activate."""
        if isinstance(self.proj, QuantLinear):
            return self.proj.followed(hidden_states, "gelu_tanh" if self.approximate == "tanh" else "gelu")
        activated: Tensor = super().forward(hidden_states)
        return activated


class FusedGEGLU(GEGLU):
    """diffusers' gated GELU behind a linear: activation and product in one pass over what a quantized one gives."""

    def __init__(self, own: GEGLU) -> None:
        nn.Module.__init__(self)  # GEGLU's own would make a linear
        self.proj = own.proj

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Project, activate and gate."""
        if not isinstance(self.proj, QuantLinear):
            given: Tensor = super().forward(hidden_states, *args, **kwargs)
            return given
        projected = self.proj(hidden_states)
        return onepass.gated(projected) if onepass.takes(projected) else onepass.gated_written_out(projected)


_FUSED: dict[type[nn.Module], type[FusedGELU | FusedGEGLU]] = {GELU: FusedGELU, GEGLU: FusedGEGLU}


def fuse(module: nn.Module) -> None:
    """Replace activations behind quantized linear layers by fused ones; names of tensors stay."""
    for name, part in list(module.named_modules()):
        if name and type(part) in _FUSED and isinstance(part.get_submodule("proj"), QuantLinear):
            module.set_submodule(name, _FUSED[type(part)](part).train(part.training))
