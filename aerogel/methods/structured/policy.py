"""Pruning of channels: which leave the layers of every block, and how the layers that read them are adjusted; a method says which kind.

Legend: O outputs, I inputs, K inputs that are kept, R rows of the layers that make them, U units of inputs that leave together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from aerogel.errors import AerogelError, reasons
from aerogel.layers.conv import matrix
from aerogel.methods.base import Before, CalibrationSize, CostEstimate, Method, Requirement, name_of
from aerogel.model.batches import Batches
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.narrowing import WORDS, Narrower, Narrowing, narrowing_of
from aerogel.model.network import Network
from aerogel.model.rounding import output_error
from aerogel.model.statistics import InputStatistics, collect
from aerogel.model.structure.coupled import CoupledChannels, Kind
from aerogel.model.walk import Walk, blocks_of
from aerogel.numerics.structured_pruning import by_unit, largest, obs_order, repaired, wanda_scores

_MEASURED = ("obs", "wanda")
"""Criteria that look at inputs."""
_MOMENTS = 1 << 28
"""Numbers that the second moments of layers may hold which are collected in one pass over the calls of a block."""


class StructuredMethod(Method):
    """A method by which parts of a model leave for good, so that what is left is faster by itself."""

    @abstractmethod
    def strengths(self, network: Network) -> list[Self]:
        """Return this method at every share that leaves less of the model than the one before it, the weakest first.

        Raises AerogelError where nothing of its kind can leave the model.
        """

    def without_calibration(self) -> Self:
        """Return a method that removes as much, and reads no calibration data where it can do without."""
        return self


@dataclass(frozen=True)
class StructuredPruning(StructuredMethod):
    """A method that removes channels from every block alike, and adjusts the layers that read them.

    Blocks are done one after another: each reads what the blocks before it give by then.
    """

    kind: ClassVar[Kind]
    """The kind of channels that leave."""
    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "layers"

    share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the channels or heads of each layer to remove, rounded."""
    criterion: Literal["obs", "wanda", "magnitude", "l1", "l2"] = "obs"
    """`obs`: output error once the remaining weights are adjusted; `wanda`: |weight| x norm of the input; `magnitude`: weights alone;
    `l1`, `l2`: norm of the weights that make a channel (arXiv:1608.08710)."""
    repair: bool = True
    """Adjust the layer that reads what is left by least squares on the calibration data, to make up for what was removed."""
    percdamp: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Ridge towards the original weight, as a share of the mean diagonal of the Hessian of the inputs."""
    ignore: tuple[str, ...] = field(default=(), kw_only=True)
    """Layers whose inputs stay (down or output projections): globs on full dotted names or `re:` patterns; all layers of one setting."""

    @abstractmethod
    def staying(self, units: int) -> int:
        """Return how many of so many units stay."""

    def strengths(self, network: Network) -> list[Self]:
        """Return the method at the least whole percent for every number of units that can stay."""
        if not any(one.kind == self.kind for each in network.coupled.values() for one in each):
            raise AerogelError(f"this {network.family.name} model has no {WORDS[self.kind]} that can leave a block")
        units = sorted({one.units for each in network.coupled.values() for one in each if one.kind == self.kind})
        found, before = list[Self](), units
        for percent in range(1, 100):
            made = replace(self, share=percent / 100)
            if (left := [made.staying(count) for count in units]) != before:
                found.append(made)
                before = left
        return found

    def without_calibration(self) -> Self:
        """Return the method by weights alone: which channels leave does not change how fast the others are."""
        return replace(self, criterion="magnitude", repair=False)

    @property
    def requires(self) -> frozenset[Requirement]:  # type: ignore[override]
        """Calls where it looks at inputs, and no zeros that an adjustment would fill."""
        needed: set[Requirement] = {"uncached", self.kind}
        if self.repair or self.criterion in _MEASURED:
            needed.add("calls")
        if self.repair:
            needed.add("dense")
        return frozenset(needed)

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Every token passes the whole model twice: for the inputs of the readers, and for what the next block reads."""
        return CostEstimate(model_tokens=2.0 * size.tokens if "calls" in self.requires else 0.0)

    def narrowing(self, network: Network) -> Narrowing:
        """Return what leaves and the settings that say so; raises AerogelError where that cannot be."""
        return narrowing_of(network, self.kind, self.staying, self.ignore)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for a layer that is quantized by then, and for a share that removes nothing."""
        found = list(reasons(lambda: self.narrowing(network)))
        yield from found
        if found:
            return
        narrowing = self.narrowing(network)
        layers = {name.rpartition(".")[0] for name in narrowing.shapes}
        if quantized := sorted(layers & before.quantized.keys()):
            yield f"{quantized[0]} is quantized by then; put {name_of(self)} before that"
        if self.share > 0 and not narrowing.blocks:
            yield f"share {self.share:g} is too small to remove anything from this model; give a larger one"

    def remarks(self, network: Network) -> Iterator[str]:
        """Name layers that stay as wide as they are, and what cannot be kept because the model's class has no module for it."""
        if left := self.narrowing(network).left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            yield f"leaves what {left[0]}{more} read as it is: no setting of the configuration says how much that is"
        if network.unbuilt is not None:
            yield f"leaves {network.unbuilt.told} out: the model's class has no module for it, and the settings no longer fit it"

    def reshapes(self, network: Network) -> Mapping[str, tuple[int, ...]]:
        """Return the parameters that have another shape afterwards."""
        return self.narrowing(network).shapes

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Remove channels block by block, in the order in which blocks run; those that no call reaches come last."""
        narrowing = self.narrowing(network)
        if not narrowing.blocks:
            return
        narrower, left, batches = Narrower(network, narrowing), dict(narrowing.blocks), Batches(network.placement)
        for block in Walk(network, calls, batches=batches) if "calls" in self.requires else ():
            self._visit(block, left.pop(block.name, ()), narrower, batches)
        for block in blocks_of(network):
            self._visit(block, left.pop(block.name, ()), narrower, None)
        network.unbuilt = None
        narrower.finish()

    def _visit(self, block: Block, coupled: Sequence[tuple[CoupledChannels, int]], narrower: Narrower, batches: Batches | None) -> None:
        if not coupled:
            return
        for part in _in_passes(coupled):
            readers = [one.reader for one, _ in part]
            seen = batches.fit(partial(collect, block, readers, moment=True)) if batches is not None else {}
            for one, stays in part:
                self._remove(block, one, stays, seen.get(one.reader), narrower)
        narrower.finish_block(block.name)
        for note in block.notes:
            block.network.notes.append({"block": block.name, **note})

    def _remove(self, block: Block, one: CoupledChannels, stays: int, statistics: InputStatistics | None, narrower: Narrower) -> None:
        """Remove units of one reader, and note the relative error of its output before and after it was adjusted."""
        weight_OI = matrix(block.module.get_submodule(one.reader)).detach()  # type: ignore[arg-type]
        moment_II = None if statistics is None else statistics.moment()
        unit_K, fallback = self._chosen(block, one, stays, moment_II)
        kept_K = one.columns_of(unit_K).to(weight_OI.device)
        weight_OK = weight_OI[:, kept_K]
        facts: dict[str, Any] = {
            "removed": one.units - stays,
            "of": one.units,
            "unrepaired": _error(weight_OI, kept_K, weight_OK, moment_II),
        }
        if self.repair and moment_II is not None:
            found = repaired(weight_OI, moment_II, kept_K, self.percdamp)
            weight_OK = found.weight_OK.to(weight_OI)
            fallback = fallback or ("not adjusted: the Hessian is not positive definite" if found.failed else "")
        block.note(
            one.reader, **facts, error=_error(weight_OI, kept_K, weight_OK, moment_II), **({"fallback": fallback} if fallback else {})
        )
        narrower.keep(block.name, one, unit_K, weight_OK)

    def _chosen(self, block: Block, one: CoupledChannels, stays: int, moment_II: Tensor | None) -> tuple[Tensor, str]:
        """Return the units that stay, and a note where they were not chosen by the criterion."""
        weight_OI: Tensor = block.module.get_submodule(one.reader).get_parameter("weight").detach().float().flatten(1)
        if self.criterion in ("l1", "l2"):
            return largest(_norms(block, one, 1 if self.criterion == "l1" else 2), stays), ""
        if self.criterion == "magnitude" or moment_II is None:
            fallback = "" if "calls" not in self.requires else "pruned by magnitude, not adjusted: no token reached it"
            return largest(_magnitudes(block, one, weight_OI), stays), fallback if moment_II is None else ""
        if self.criterion == "obs":
            gone = obs_order(weight_OI, moment_II, one.columns_I, one.units, one.units - stays, self.percdamp)
            if gone is not None:
                stays_U = torch.ones(one.units, dtype=torch.bool)
                stays_U[gone.cpu()] = False
                return stays_U.nonzero()[:, 0], ""
        scores_U = wanda_scores(weight_OI, moment_II.diagonal(), one.columns_I, one.units)
        fallback = "pruned as by wanda: the Hessian is not positive definite" if self.criterion == "obs" else ""
        return largest(scores_U, stays).cpu(), fallback


def _in_passes(coupled: Sequence[tuple[CoupledChannels, int]]) -> Iterator[list[tuple[CoupledChannels, int]]]:
    """Yield coupled channels of a block in parts whose moments are held at once."""
    part: list[tuple[CoupledChannels, int]] = []
    for each in coupled:
        if part and sum(len(one.columns_I) ** 2 for one, _ in (*part, each)) > _MOMENTS:
            yield part
            part = []
        part.append(each)
    yield part


def _magnitudes(block: Block, one: CoupledChannels, weight_OI: Tensor) -> Tensor:
    """Return the norm of the columns that read a unit times that of its rows in each layer that makes them: score_U."""
    learned = dict(block.module.named_parameters(remove_duplicate=False))
    square_U = by_unit(weight_OI.square().sum(0), one.columns_I, one.units).cpu()
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in one.rows if name.endswith(".weight")):
        of_layer_U = torch.zeros(one.units)
        for name, unit_R in one.rows.items():
            if name.rpartition(".")[0] == layer and name in learned:
                square_R = learned[name].detach().float().square()
                of_layer_U += by_unit(
                    (square_R if square_R.ndim == 1 else square_R.flatten(1).sum(1)).cpu()[unit_R >= 0], unit_R[unit_R >= 0], one.units
                )
        square_U = square_U * of_layer_U
    return square_U.sqrt()


def _norms(block: Block, one: CoupledChannels, order: int) -> Tensor:
    """Return the norm of the rows of a unit in the weights of all layers that make it, as one vector: score_U."""
    total_U = torch.zeros(one.units)
    for name, unit_R in one.rows.items():
        values = block.module.get_submodule(name.rpartition(".")[0])._parameters.get(name.rpartition(".")[2])
        if values is not None and values.ndim > 1:
            powers_R = values.detach().float().flatten(1).abs().pow(order).sum(1).cpu()
            total_U += by_unit(powers_R[unit_R >= 0], unit_R[unit_R >= 0], one.units)
    return total_U.pow(1 / order)


def _error(weight_OI: Tensor, kept_K: Tensor, weight_OK: Tensor, moment_II: Tensor | None) -> float:
    error_OI = weight_OI.float().clone()
    error_OI[:, kept_K] -= weight_OK.float()
    return output_error(error_OI, weight_OI.float(), moment_II)
