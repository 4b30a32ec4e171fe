"""Error of a denoiser's inputs in 8 bits by the granularity of their scales: tensor, step, channel or token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.data.denoising import Denoising, record
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import Measure, original_of, pipeline_of
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import grid_from_range, to_codes, to_values
from aerogel.numerics.scheme import PerTensor, PerToken, TensorScheme
from aerogel.options import Count, Guidance

STATIC = TensorScheme(format_named("int8"), PerTensor(), symmetric=False)
"""Ranges that are known before have a zero point, those of `activation_ranges` and `fsc`."""
DYNAMIC = TensorScheme(format_named("int8"), PerToken(), symmetric=True)
"""Scales measured at run time have none, those of W8A8 and W4A8."""


@dataclass(frozen=True)
class Inputs(Measure):
    """Error of rounding the inputs to 8 bits, layer by layer: with one range, one per step, one per channel, one scale per token.

    It says which granularity a denoiser needs. Ranges are the extremes over all images. Convolutions are read as linear layers whose tokens
    are pixels; one scale a channel cannot be had in an integer product, but smoothing folds it into the weights.
    """

    compares: ClassVar[bool] = True
    asked: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    count: Count = 8
    """Images that are made to see the inputs."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: Guidance | None = None
    """Guidance scale; None leaves the pipeline's own."""
    prompts: tuple[str, ...] = ()
    """Prompts for text-to-image pipelines."""

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return layers, and for each of them the squared error over the squared size with `one`, `step`, `channel` and `token`.

        Raises AerogelError when the pipeline needs prompts, an option is out of range, or the original is broken or has no layer in float.
        """
        if min(self.count, self.steps) < 1:
            raise AerogelError(f"count {self.count}, steps {self.steps}: each is at least 1")
        original = original_of(self, against)
        wanted = Denoising(self.count, self.steps, self.guidance, tuple(self.prompts), batch=self.count)
        calls = record(pipeline_of(original), original.module, wanted)
        clock = TimestepIndex(Trajectories.of(original, calls).distinct_steps)
        layers = {name: part for name, part in original.module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        with torch.no_grad(), clock.on(original.module):
            ranges = _ranges(original, calls, clock, layers)
            if not ranges:
                raise AerogelError(
                    "the original has no unquantized linear layer or convolution; give the model as it was before compression"
                )
            if broken := [name for name, (lows_TC, highs_TC) in ranges.items() if not (lows_TC.isfinite() & highs_TC.isfinite()).all()]:
                raise AerogelError(f"{broken[0]} of the original reads NaN or infinity, or nothing at some step")
            errors = _errors(original, calls, clock, {name: layers[name] for name in ranges}, ranges)
        return {"layers": list(ranges), **{kind: [errors[name][kind] for name in ranges] for kind in next(iter(errors.values()))}}


def losses(x_RC: Tensor, lows_TC: Tensor, highs_TC: Tensor, step: int) -> dict[str, Tensor]:
    """Return the sum of squared errors in 8 bits by what shares a scale, for inputs of one step under the extremes of all."""
    low_C, high_C = lows_TC.amin(0), highs_TC.amax(0)
    return {
        "one": _loss(x_RC, low_C.amin(), high_C.amax(), STATIC),
        "step": _loss(x_RC, lows_TC[step].amin(), highs_TC[step].amax(), STATIC),
        "channel": _loss(x_RC, low_C, high_C, STATIC),
        "token": _loss(x_RC, *torch.aminmax(x_RC, dim=1, keepdim=True), DYNAMIC),
    }


def _loss(x_RC: Tensor, low: Tensor, high: Tensor, scheme: TensorScheme) -> Tensor:
    grid = grid_from_range(low, high, scheme)
    zero = 0 if grid.zero is None else grid.zero
    codes_RC = to_codes(x_RC / grid.step + zero, scheme.format)
    return ((to_values(codes_RC, scheme.format) - zero) * grid.step - x_RC).double().square().sum()


def _ranges(
    network: Network, calls: Sequence[Call], clock: TimestepIndex, layers: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and the largest number in each channel at each step, (T, C) each, of the layers that are reached."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        row, x_RC = clock.rows[0], _rows(x, layers[name])
        low_C, high_C = torch.aminmax(x_RC, dim=0)
        if name not in found:
            shape = (len(clock.steps), x_RC.shape[1])
            found[name] = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        lows_TC, highs_TC = found[name]
        lows_TC[row] = torch.minimum(lows_TC[row], low_C)
        highs_TC[row] = torch.maximum(highs_TC[row], high_C)

    with capture_inputs(layers, see):
        for call in calls:
            network.run(call)
    return found


def _errors(
    network: Network,
    calls: Sequence[Call],
    clock: TimestepIndex,
    layers: Mapping[str, nn.Module],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, dict[str, float]]:
    """The squared error over the squared size of each layer's inputs, by what shares a scale."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    sizes: dict[str, float] = defaultdict(float)

    def see(name: str, x: Tensor) -> None:
        x_RC = _rows(x, layers[name])
        sizes[name] += float(x_RC.double().square().sum())
        for kind, loss in losses(x_RC, *ranges[name], clock.rows[0]).items():
            sums[name][kind] += float(loss)

    with capture_inputs(layers, see):
        for call in calls:
            network.run(call)
    return {name: {kind: loss / (sizes[name] or 1.0) for kind, loss in kinds.items()} for name, kinds in sums.items()}


def _rows(x: Tensor, layer: nn.Module) -> Tensor:
    """Tokens (or pixels) by channels; a pipeline's call is of one step, so all of them are."""
    x = x.detach().float().cpu()
    x = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    return x.reshape(-1, x.shape[-1])
