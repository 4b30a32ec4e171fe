"""A block on its visit: the module, what goes into it, and what a method may ask and change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.kernels.malloc import release_pages
from aerogel.layers.conv import Layer, QuantConv2d, is_plain, matrix
from aerogel.layers.linear import QuantLinear
from aerogel.layers.replacement import Replacement
from aerogel.layers.scaled_input import ScaledInput
from aerogel.model.calls import Call
from aerogel.model.edges import Edge
from aerogel.model.match import matches, names_exactly
from aerogel.model.network import Network
from aerogel.model.processes import ALONE, Processes
from aerogel.model.samples import Samples
from aerogel.numerics.quantize import Grid, grid_from_range, outer_scale
from aerogel.numerics.scheme import PerTensor, TensorScheme
from aerogel.numerics.search import Shared


class Inputs(Protocol):
    """Calls that can be gone through again and again; each pass computes them anew from what the blocks before gave."""

    def __iter__(self) -> Iterator[Call]: ...
    def __len__(self) -> int: ...


@dataclass(eq=False)
class Block:
    """One block of a network during a walk; the last one of a walk may be the network around its blocks, named ''."""

    name: str
    module: nn.Module
    position: int
    total: int
    calls: Inputs
    network: Network
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Lines that methods write for the report."""
    targets: list[Any] | None = None
    """Outputs of the original model's block for the same calls, on inputs of its own; None where no method asked for a teacher."""
    original: Block | None = None
    """The block of the original model, with inputs of its own; None where no method asked for a teacher."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that act inside this block and are not its own, those of policies that are on, by full name. A method may learn them: a
    value that it puts in the place of another acts from the next forward on, and the engine takes over what stands here in the end."""
    one_row_each: Inputs | None = None
    """The calls, those of tokens with their first sample only: enough to see which way they take through the block."""
    outputs: list[Any] | None = None
    """Outputs of the block as it is now for its calls, where a method has computed them; None when it has to be run."""
    processes: Processes = ALONE
    """The processes that share the calls of this block; one process where all its calls are here."""

    def full_name(self, name: str) -> str:
        """The dotted name in the network of a part of the block."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype that scales and float weights will have on disk; None means that of the weight at hand."""
        return self.network.stored_dtype

    def run(self, call: Call) -> Any:
        """One forward of the block, without gradients."""
        with torch.no_grad():
            return self.module(*call.args, **call.kwargs)

    def samples(self, *, original_inputs: bool = False) -> Samples:
        """The samples of all calls with what the float network's block gives for them, to be mixed into batches.

        Their inputs are those that the block gets by now, or with `original_inputs` those that it gets in the original model.
        Raises AerogelError where layers have one scale a step: a batch of mixed steps run outside of the denoiser has no time step.
        """
        clocked = [name for name, part in self.module.named_modules() if isinstance(part, QuantLinear) and part.timestep_index is not None]
        if clocked:
            raise AerogelError(f"{self.full_name(clocked[0])} has one scale a step already: put steps like fsc after those that fit blocks")
        assert self.targets is not None, "the engine gives them to methods that need a teacher"
        place = self.network.placement  # all calls are kept on the host, a batch of them goes to the device
        source = self if not original_inputs else self.original
        assert source is not None, "the engine gives it with the targets"
        return Samples([Call(*place.take_back((call.args, call.kwargs))) for call in source.calls], self.targets, place)

    def linears(self, targets: Iterable[str] = ("Linear",), ignore: Iterable[str] = ()) -> dict[str, Layer | QuantLinear]:
        """The block's linear layers and convolutions (`Conv2d`), float or quantized, that the patterns mean, by name in the block.

        Patterns are held against full dotted names; `@name` stands for a list of the family. What the family keeps is left out unless
        a target spells its name.
        """
        targets, ignore = self.network.expand_patterns(targets), self.network.expand_patterns(ignore)
        found = {}
        for name, linear in self._all_linears().items():
            full = self.full_name(name)
            kept = self.network.never_quantizes(full) and not any(names_exactly(full, target) for target in targets)
            if not kept and _means(full, linear, targets) and not matches(full, ignore, linear):
                found[name] = linear
        return found

    def edges(self) -> Sequence[Edge]:
        """The edges of this block, as they were found and verified on one of its kind; none around the blocks.

        An edge of a layer that was replaced is left out: quantized weights cannot be scaled.
        """
        found = self.network.edges[self.name].edges if self.name else ()
        return [edge for edge in found if not any(self._is_replaced(name) for name in (*edge.sources, *edge.sinks))]

    @torch.no_grad()
    def shared_scale(self, name: str, scheme: TensorScheme) -> Shared | None:
        """Return what a layer has in common with the others of its fused set, because engines keep one for all of them.

        That is the outer scale of a format that has one, and the whole grid where a weight has one scale. It covers the weights of the set
        as they are now; once one of them is quantized, what that one has is that of the others too. None where each has its own.
        """
        whole = isinstance(scheme.granularity, PerTensor)
        sets = self.network.fused_sets.get(self.name, ()) if whole or scheme.scale_format == "e4m3" else ()
        layers = [self._layer(other) for names in sets if name in names for other in names]
        grids = [layer.grid() for layer in layers if isinstance(layer, QuantLinear) and (whole or layer.outer is not None)]
        if grids:
            scale, zero, outer = (None if part is None else part.clone() for part in grids[0])  # tensors of one file cannot share memory
            return Grid(scale, zero) if whole and scale is not None else outer
        ends = [torch.stack(torch.aminmax(layer.weight)) for layer in layers if isinstance(layer, Layer)]
        if not ends:
            return None
        low, high = torch.stack(ends)[:, 0].amin().float(), torch.stack(ends)[:, 1].amax().float()
        return grid_from_range(low, high, scheme) if whole else outer_scale(torch.maximum(-low, high), scheme)

    def _layer(self, name: str) -> nn.Module:
        part = self.module.get_submodule(name)
        return part.inner if isinstance(part, ScaledInput) else part

    def _is_replaced(self, name: str) -> bool:
        return isinstance(self.module.get_submodule(name), Replacement)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of a part of the block."""
        self.module.set_submodule(name, module)
        release_pages()  # what a method has freed by now stays with the process otherwise (measured: up to 290 MB more at the peak)

    @torch.no_grad()
    def prune(self, name: str, kept_OI: Tensor) -> None:
        """Set the weights of a float layer to zero where `kept_OI` is False, and have later steps keep all its zeros."""
        matrix(self.module.get_submodule(name)).masked_fill_(~kept_OI, 0)  # type: ignore[arg-type]
        self.network.pruned.add(self.full_name(name))

    def kept_mask(self, name: str) -> Tensor | None:
        """Return where the weight_OI of a layer that an earlier step pruned is not zero; None for a layer that is not pruned."""
        return matrix(self.module.get_submodule(name)) != 0 if self.full_name(name) in self.network.pruned else None  # type: ignore[arg-type]

    def copy_first(self, processes: Processes) -> None:
        """Take the values that the block has in the first process: devices may differ in the last bits."""
        inside = tuple(f"{name}." for name in self.network.blocks()) if not self.name else ()
        processes.copy_first({name: tensor for name, tensor in self.module.state_dict().items() if not name.startswith(inside)})

    def note(self, name: str, **facts: Any) -> None:
        """Write down facts about a part of the block for the report: numbers and short texts."""
        self.notes.append({"name": self.full_name(name), **facts})

    def _all_linears(self) -> dict[str, Layer | QuantLinear]:
        inside = tuple(f"{name}." for name in self.network.blocks()) if not self.name else ()
        return {
            name: module
            for name, module in self.module.named_modules()
            if (isinstance(module, QuantLinear) or (isinstance(module, Layer) and is_plain(module))) and not name.startswith(inside)
        }


def _means(name: str, linear: nn.Module, targets: tuple[str, ...]) -> bool:
    # A quantized linear still answers to the class name of what it replaced, a derived class to that of torch.
    was = "Conv2d" if isinstance(linear, QuantConv2d | nn.Conv2d) else "Linear"
    return matches(name, targets, linear) or was in targets
