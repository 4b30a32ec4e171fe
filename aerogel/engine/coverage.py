"""Coverage: how many layers of a compressed model have quantized weights and inputs, and which attention modules quantized operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aerogel.engine.policies import CalibratedPolicy
from aerogel.io.record.schema import Coverage
from aerogel.layers.conv import Layer
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network
from aerogel.numerics.scheme import PerStep, TensorScheme


def coverage(network: Network, policies: Sequence[CalibratedPolicy]) -> Coverage:
    """Return the number of layers by format of weights and inputs, the layers not quantized, and attention modules with quantized operands.

    Results of two methods compare only where this is equal.
    """
    layers = {name: part for name, part in network.module.named_modules() if isinstance(part, Layer | QuantLinear)}
    quantized = {name: part.scheme for name, part in layers.items() if isinstance(part, QuantLinear)}
    attentions = [name for measured in policies for name in measured.policy.quantized(measured.state)]
    return Coverage(
        layers=len(layers),
        weights=dict(Counter(_named(scheme.weights) for scheme in quantized.values())),
        inputs=dict(Counter(_named(scheme.inputs) for scheme in quantized.values() if scheme.inputs is not None)),
        unquantized_weights=[name for name in layers if name not in quantized],
        unquantized_inputs=[name for name in layers if name not in quantized or quantized[name].inputs is None],
        attentions=attentions,
    )


def _named(scheme: TensorScheme) -> str:
    if isinstance(scheme.granularity, PerStep):
        return f"{scheme.format}, one range a step"
    return f"{scheme.format}, measured at run time" if scheme.dynamic else str(scheme.format)
