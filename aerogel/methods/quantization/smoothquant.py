"""SmoothQuant: moves outliers of activations into weights, so that both can be rounded to 8 bits (arXiv:2211.10438).

Letters in names: O outputs, I inputs, C channels of an edge, T kept rows of inputs. Nothing is quantized here: the network computes
what it did, and a step such as rtn with a W8A8 scheme comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.methods.base import BlockMethod, Requirement
from aerogel.model.block import Block
from aerogel.model.edges import Edge, fold, gather, spread
from aerogel.model.processes import Processes
from aerogel.model.statistics import InputStatistics, collect
from aerogel.numerics.quantize import dynamic_grid, fake_quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from aerogel.options import Count, Share


@dataclass(frozen=True)
class Smoothquant(BlockMethod):
    """Smooths the inputs of linear layers with scales that the preceding norms, or the modulation behind them, absorb."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "edges", "uncached"})
    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "layers"
    shares_calls: ClassVar[bool] = True

    alpha: Share | Literal["search"] = 0.5
    """Share of the difficulty that moves from activations to weights, 0 to 1; or search it for every edge by the output's error."""
    scheme: Scheme | str = "W8A8"
    """Scheme that the search assumes of the step that quantizes; must quantize inputs."""
    include_linear_sources: bool = False
    """Smooth inputs that come from a linear layer instead of a norm (value to output, up to down) too."""
    rows: Count = 512
    """Rows of every input, spread evenly over all calls, that the search looks at."""
    targets: tuple[str, ...] = ("Linear",)
    """Linear layers whose inputs are smoothed: globs on full dotted names, `re:` patterns or class names."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave alone; wins over targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha == "search" and Scheme.parse(self.scheme).inputs is None:
            raise AerogelError(f"smoothquant: scheme {self.scheme} does not quantize inputs; there is nothing to search for")

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Smooth the inputs of the block's linear layers."""
        linears = {name: module for name, module in block.linears(self.targets, self.ignore).items() if isinstance(module, nn.Linear)}
        edges = [edge for edge in block.edges() if self._smooths(block, edge, linears)]
        sinks = dict.fromkeys(name for edge in edges for name in edge.sinks if name in linears)
        statistics = collect(block, sinks, ranges=True, rows=self.rows if self.alpha == "search" else 0)
        for edge in edges:
            readers = [name for name in edge.sinks if name in statistics]
            if readers:
                seen = _together(statistics[name] for name in readers)
                self._smooth(block, edge, {name: linears[name] for name in readers}, seen)

    def _smooths(self, block: Block, edge: Edge, linears: dict[str, nn.Linear]) -> bool:
        linear = edge.added_I is None and any(isinstance(block.module.get_submodule(name), nn.Linear) for name in edge.sources)
        return any(name in linears for name in edge.sinks) and (self.include_linear_sources or not linear)

    def _smooth(self, block: Block, edge: Edge, readers: dict[str, nn.Linear], seen: InputStatistics) -> None:
        inputs_C = gather(edge, seen.absmax())
        weights_C = gather(edge, torch.stack([linear.weight.float().abs().amax(0) for linear in readers.values()]).amax(0))
        alpha = (
            self.alpha
            if self.alpha != "search"
            else self._best_alpha(inputs_C, weights_C, partial(spread, edge), list(readers.values()), seen, block.processes)
        )
        if alpha is not None:
            fold(block.module, edge, smoothing(inputs_C, weights_C, alpha))
        for name in readers:
            block.note(name, alpha=alpha)

    def _best_alpha(
        self,
        inputs_C: Tensor,
        weights_C: Tensor,
        spread: Callable[[Tensor], Tensor],
        readers: Sequence[nn.Linear],
        seen: InputStatistics,
        processes: Processes,
    ) -> float | None:
        """The alpha with the least error of the readers' outputs; None when it is best to leave things as they are.

        Processes share the candidates: all have the same rows.
        """
        scheme = Scheme.parse(self.scheme)
        x_TI, weight_OI = seen.sample().float(), torch.cat([linear.weight.float() for linear in readers])
        exact_TO = x_TI @ weight_OI.T

        def cost(alpha: float | None) -> float:
            scale_I = torch.ones_like(x_TI[0]) if alpha is None else spread(smoothing(inputs_C, weights_C, alpha))
            return _cost(x_TI, weight_OI, exact_TO, scale_I, scheme)

        costs = processes.each({alpha: partial(cost, alpha) for alpha in (None, *(step / 20 for step in range(21)))})
        return min(costs, key=lambda alpha: costs[alpha])


def _together(parts: Iterable[InputStatistics]) -> InputStatistics:
    """Return the statistics of all readers together: experts that read one norm see different tokens."""
    first, *others = dict.fromkeys(parts)
    total = deepcopy(first) if others else first
    for other in others:
        total.merge(other)
    return total


def smoothing(inputs_C: Tensor, weights_C: Tensor, alpha: float) -> Tensor:
    """The scale that inputs are divided by: max|x|^alpha / max|w|^(1 - alpha); one for a channel that was always zero."""
    scale_C = (inputs_C**alpha / weights_C.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
    return torch.where(inputs_C > 0, scale_C, 1.0)


def _cost(x_TI: Tensor, weight_OI: Tensor, exact_TO: Tensor, scale_I: Tensor, scheme: Scheme) -> float:
    """Relative squared error of the outputs, mean over tokens, when inputs and weights are rounded in this scaling.

    Relative, because the few tokens whose activations are enormous would otherwise decide alone.
    """
    inputs, weights = scheme.inputs, scheme.weights
    assert inputs is not None, "the options were checked"
    small_TI, large_OI = x_TI / scale_I, weight_OI * scale_I
    rounded_TI = fake_quantize(small_TI, dynamic_grid(small_TI, inputs), inputs)
    rounded_OI = fake_quantize(large_OI, weight_grid(large_OI, weights), weights)
    error_T = (rounded_TI @ rounded_OI.T - exact_TO).square().sum(1)
    return float((error_T / exact_TO.square().sum(1).clamp(min=torch.finfo(error_T.dtype).tiny)).mean())
