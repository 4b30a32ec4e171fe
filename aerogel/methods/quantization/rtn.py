"""Round to nearest: every weight to the nearest point of its grid; no calibration unless inputs have static ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from aerogel.layers.conv import matrix
from aerogel.methods.base import Requirement, WeightMethod
from aerogel.model.block import Block
from aerogel.model.rounding import InputRange, has_static_inputs, output_error, round_to_nearest, static_inputs
from aerogel.model.statistics import collect
from aerogel.model.unseen_experts import borrow_input_ranges
from aerogel.numerics.quantize import grouped
from aerogel.numerics.scheme import Scheme
from aerogel.numerics.search import Observer, observe


@dataclass(frozen=True)
class Rtn(WeightMethod):
    """Rounds every weight to the nearest grid point."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    shares_calls: ClassVar[bool] = True

    observer: Observer = "minmax"
    """Search for ranges: minmax (cover every weight) or mse (least squared error)."""
    input_range: InputRange = "absmax"
    """Range of static inputs: absmax (extremes of all calls) or average (mean over the calls)."""

    @property
    def requires(self) -> frozenset[Requirement]:  # type: ignore[override]
        """Calls, where an input has a static range."""
        schemes = (self.scheme, *self.overrides.values())
        return frozenset({"calls", "uncached"} if any(has_static_inputs(Scheme.parse(scheme)) for scheme in schemes) else {"uncached"})

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Quantize the block's linear layers and convolutions."""
        jobs = self.assign(block)
        calibrated = [name for name, (_, scheme) in jobs.items() if has_static_inputs(scheme)]
        statistics = collect(block, calibrated, ranges=True) if calibrated else {}
        unseen = [name for name in calibrated if name not in statistics]
        for name, (linear, scheme) in jobs.items():
            dtype = block.stored_dtype or linear.weight.dtype
            weight, shared = grouped(matrix(linear), scheme.weights.granularity), block.shared_scale(name, scheme.weights)
            grid = observe(weight, scheme.weights, self.observer, shared=shared)
            seen = statistics.get(name)
            quantized = round_to_nearest(linear, scheme, grid, dtype, static_inputs(scheme, seen, self.input_range, dtype))
            error = output_error(matrix(linear).float() - quantized.dequantized(torch.float32), matrix(linear), None)
            block.replace(name, quantized)
            block.note(
                name,
                error=error,
                error_of="weights",
                **({"fallback": "input range unknown: no token reached it"} if name in unseen else {}),
            )
        borrow_input_ranges(block, unseen)
