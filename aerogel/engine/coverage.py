"""Coverage: which layers of a compressed network have weights and inputs in codes, and which attentions round their operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from aerogel.engine.policies import CalibratedPolicy
from aerogel.layers.conv import Layer
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network
from aerogel.numerics.scheme import PerStep, TensorScheme


def coverage(network: Network, policies: Sequence[CalibratedPolicy]) -> dict[str, Any]:
    """Return how many layers have weights and inputs in which format, the names of those left in float, and the rounded attentions.

    It is what two methods have to share before their results are compared.
    """
    layers = {name: part for name, part in network.module.named_modules() if isinstance(part, Layer | QuantLinear)}
    codes = {name: part.scheme for name, part in layers.items() if isinstance(part, QuantLinear)}
    attentions = [name for measured in policies for name in measured.policy.quantized(measured.state)]
    return {
        "layers": len(layers),
        "weights": dict(Counter(_named(scheme.weights) for scheme in codes.values())),
        "inputs": dict(Counter(_named(scheme.inputs) for scheme in codes.values() if scheme.inputs is not None)),
        "float_weights": [name for name in layers if name not in codes],
        "float_inputs": [name for name in layers if name not in codes or codes[name].inputs is None],
        "attentions": attentions,
    }


def _named(scheme: TensorScheme) -> str:
    if isinstance(scheme.granularity, PerStep):
        return f"{scheme.format}, one range a step"
    return f"{scheme.format}, measured at run time" if scheme.dynamic else str(scheme.format)
