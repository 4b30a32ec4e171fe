"""ShortGPT: layers that change the stream least leave the model (arXiv:2403.03853).

T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, CalibrationSize, CostEstimate, Requirement
from aerogel.methods.structured.policy import StructuredMethod
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import temporary_hooks
from aerogel.model.layer_removal import decoder_layers
from aerogel.model.network import Network
from aerogel.options import Count, CountOrZero

_UNKNOWN = 0.5
"""Cosine that a token counts with whose stream is zero."""


@dataclass(frozen=True)
class Shortgpt(StructuredMethod):
    """Removes the layers of least block influence: one minus the mean cosine between what goes into a layer and what comes out."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "layers", "uncached"})

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the layers to remove, rounded to whole layers, at least one; 0.2 where neither this nor count is given."""
    count: Count | None = None
    """Number of layers to remove, instead of a share."""
    protect_first: CountOrZero = 1
    """Layers at the start that stay."""
    protect_last: CountOrZero = 1
    """Layers at the end that stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.count is not None:
            raise AerogelError("shortgpt: share and count both say how many layers leave; give one of them")

    def strengths(self, network: Network) -> list[Self]:
        """Return the method at every number of layers that may leave."""
        blocks = decoder_layers(network).tower.blocks
        most = min(len(self._open(blocks)), len(blocks) - 1)
        return [replace(self, share=None, count=number) for number in range(1, most + 1)]

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every token passes the whole model once."""
        return CostEstimate(model_tokens=size.tokens)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Count the layers that may leave."""
        yield from reasons(lambda: self._number(decoder_layers(network).tower.blocks))

    def removes(self, network: Network) -> tuple[str, ...]:
        """Return as many layers as leave, for the plan; which ones, only the calls show."""
        blocks = decoder_layers(network).tower.blocks
        return tuple(self._open(blocks)[: self._number(blocks)])

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Measure every layer and remove those of least influence; of equal ones the first."""
        layers = decoder_layers(network)
        blocks = layers.tower.blocks
        influence = block_influence(network, blocks, calls)
        gone = sorted(self._open(blocks), key=influence.__getitem__)[: self._number(blocks)]
        for name in blocks:
            network.note(name, name, influence=influence[name], removed=name in gone)
        layers.remove(network, gone)

    def _open(self, blocks: Sequence[str]) -> Sequence[str]:
        """The layers that may leave."""
        return blocks[self.protect_first : len(blocks) - self.protect_last]

    def _number(self, blocks: Sequence[str]) -> int:
        """Return how many layers leave; raises AerogelError where fewer may."""
        share = 0.2 if self.share is None else self.share
        number = self.count if self.count is not None else max(1, round(share * len(blocks)))
        if number > len(self._open(blocks)) or number >= len(blocks):
            raise AerogelError(
                f"{number} of {len(blocks)} layers are to leave, and with the first {self.protect_first} and the last {self.protect_last} "
                f"protected {len(self._open(blocks))} may; remove fewer, or protect fewer"
            )
        return number


def block_influence(network: Network, blocks: Sequence[str], calls: Sequence[Call]) -> dict[str, float]:
    """Return 1 - mean cosine(input, output) over the tokens of all calls, for each block; tokens that only pad a text do not count."""
    total = dict.fromkeys(blocks, 0.0)
    tokens = dict.fromkeys(blocks, 0)
    for call in calls:
        real = call.kwargs.get("attention_mask")

        def see(name: str, x: Tensor, y: Tensor, real: Any = real) -> None:
            keep = real.bool() if isinstance(real, Tensor) and real.shape == x.shape[:-1] else torch.ones(x.shape[:-1], dtype=torch.bool)
            cosine_T = cosines(x[keep.to(x.device)], y[keep.to(x.device)])
            total[name] += float(cosine_T.sum())
            tokens[name] += len(cosine_T)

        with ExitStack() as stack:
            for name in blocks:
                stack.enter_context(temporary_hooks([_hook(network.module.get_submodule(name), name, see)]))
            network.run(call)
    return {name: 1 - total[name] / max(tokens[name], 1) for name in blocks}


def cosines(x_TH: Tensor, y_TH: Tensor) -> Tensor:
    """Return the cosine of each token's pair, in float32; one half where it is not defined."""
    x_TH, y_TH = x_TH.float(), y_TH.float()
    return ((x_TH * y_TH).sum(-1) / (x_TH.norm(dim=-1) * y_TH.norm(dim=-1))).nan_to_num(_UNKNOWN)


def _hook(block: nn.Module, name: str, see: Any) -> Any:
    """Show what goes into a block and what comes out."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(name, tensors_in((args, kwargs.get("hidden_states")))[0], tensors_in(output)[0])

    return block.register_forward_hook(hook, with_kwargs=True)
