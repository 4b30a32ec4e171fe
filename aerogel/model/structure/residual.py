"""The residual stream of a whole network: what enters it, what the blocks do with it, and what reads it behind them.

Legend: D width of the stream.

Around the blocks nothing is computed: products are answered with random numbers, drawn once, a block gives the stream that it gets, and
a block of another tower what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from aerogel.model.calls import Call, map_tensors, tensors_in
from aerogel.model.edges import Edge
from aerogel.model.hooks import patch_forward, temporary_hooks
from aerogel.model.structure.edges import BlockEdges, keeping, names_of_every_expert
from aerogel.model.structure.examples import Example, run
from aerogel.model.structure.gains import Gain, gains_in
from aerogel.model.structure.observer import Read
from aerogel.model.structure.placeholders import placeholder_weights, replaced_tensors
from aerogel.model.structure.probe import Probe, Refused, holding
from aerogel.model.structure.stream import Turn, along, close, lines_of, stream_places, turned_reads
from aerogel.model.structure.towers import Tower


@dataclass(frozen=True)
class Residual:
    """The stream that blocks read from and add to, by full names."""

    width: int
    keeps_mean: bool
    """True where only rotations pass that leave the mean over channels as it is."""
    tables: tuple[str, ...]
    """Parameters whose rows enter the stream: embeddings, positions."""
    writers: tuple[str, ...]
    """Linear layers whose outputs are added to it."""
    vectors: tuple[str, ...]
    """Parameters that are added to it as they are."""
    norms: tuple[Edge, ...]
    """Each norm that reads it, with the layers that read the norm."""
    readers: tuple[str, ...]
    """Linear layers that read it, through a norm or not."""


def residual_of(module: nn.Module, towers: Sequence[Tower], edges: Mapping[str, BlockEdges], examples: Sequence[Example]) -> Residual:
    """Find the stream of the tower that runs last, which gives the logits; raises Refused with the reason why no rotation of it passes."""
    example = next((example for example in reversed(examples) if not example.part), None)  # the one that reaches most
    if example is None or not towers:
        raise Refused("it could not be watched with inputs made up from its configuration")
    seen = _Seen.of(module, towers, example)
    blocks = seen.last.blocks
    for name in blocks:
        if edges[name].stream is None:
            raise Refused(f"{name}: {edges[name].no_stream}")
    generator = torch.Generator().manual_seed(3)

    def fill(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            values = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
            return values.double() if values.is_floating_point() else values
        if tensor.ndim > 1:
            return torch.full((1,), 0.5, dtype=torch.float64).expand(tensor.shape)
        return 1 + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with replaced_tensors(module, fill, untie=True), seen.passing(module):
        try:
            exact = Example("", example.call.map(_exact_copy))
            return _Around(module, blocks, edges, seen, exact).found()
        except RuntimeError as error:
            raise Refused(f"the model cannot be run around its blocks ({str(error).strip().splitlines()[0]})") from error


@dataclass
class _Seen:
    """Calls and outputs of blocks, and the stream as it passed the last one."""

    last: Tower
    """The tower that ran last, whose stream it is."""
    calls: dict[str, Call] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """Blocks as they ran, those of all towers."""
    arguments: dict[str, list[Tensor]] = field(default_factory=dict)
    """Float inputs of each block in the last run, the stream among them."""
    stream: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, towers: Sequence[Tower], example: Example) -> _Seen:
        """Watch one run with placeholder weights; raises Refused where not all blocks of the last tower ran."""
        tower_of = {name: tower for tower in towers for name in tower.blocks}
        found = cls(towers[-1])
        handles = []
        for name in tower_of:
            block = module.get_submodule(name)
            handles.append(block.register_forward_pre_hook(keeping(found.calls, name), with_kwargs=True))
            handles.append(block.register_forward_hook(found._keeping_output(name)))
        with temporary_hooks(handles), placeholder_weights(module):
            run(module, example)
        if not found.order:
            raise Refused("no block runs with inputs made up from its configuration")
        found.last = tower_of[found.order[-1]]
        if not set(found.last.blocks) <= set(found.order):
            raise Refused(f"not all blocks of {found.last.name} run with inputs made up from its configuration")
        return found

    def _keeping_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.order.append(name)
            self.outputs[name] = map_tensors(torch.clone, output)

        return hook

    @property
    def passed(self) -> list[str]:
        """Blocks that nothing looks into: those of the last tower, and others that ran once, so that it is known what they give."""
        return [name for name in self.calls if name in self.last.blocks or self.order.count(name) == 1]

    @contextmanager
    def passing(self, module: nn.Module) -> Iterator[None]:
        """Let every block give the stream that it gets, and beside it, as blocks of other towers, what it gave when it was watched."""
        with patch_forward({module.get_submodule(name): self._forward(name) for name in self.passed}):
            yield

    def _forward(self, name: str) -> Callable[..., Any]:
        if name not in self.last.blocks:
            return self._constant(name)
        leaves, spec = pytree.tree_flatten(self.outputs[name])
        floats = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        place_in, place_out = stream_places(_floats(self.calls[name]), [leaves[place] for place in floats])

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _floats(Call(args, kwargs))
            self.arguments[name], self.stream = given, given[place_in]
            new = list(leaves)
            new[floats[place_out]] = given[place_in]
            return pytree.tree_unflatten(new, spec)

        return forward

    def _constant(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.arguments[name] = _floats(Call(args, kwargs))
            return map_tensors(_exact_copy, self.outputs[name])

        return forward


class _Around:
    """Search around the blocks, whose weights are not needed."""

    def __init__(self, module: nn.Module, blocks: Sequence[str], edges: Mapping[str, BlockEdges], seen: _Seen, example: Example) -> None:
        self._module, self._blocks, self._edges, self._seen = module, blocks, edges, seen
        self._inside = inside = tuple(f"{name}." for name in seen.passed)
        self._parameters = {name: p for name, p in module.named_parameters(remove_duplicate=False) if not name.startswith(inside)}
        inputs: dict[str, Call] = {}
        parts = [(name, part) for name, part in module.named_modules() if name and not f"{name}.".startswith(inside)]
        handles = [part.register_forward_pre_hook(keeping(inputs, name), with_kwargs=True) for name, part in parts]
        generator = torch.Generator().manual_seed(4)

        def random(read: Read) -> Tensor:
            return torch.randn(read.shape(), generator=generator, dtype=torch.float64)

        with temporary_hooks(handles):
            self._probe = Probe(lambda: run(module, example), self._parameters, answer=random)
        self._gains = [gain for gain in gains_in(module, inputs) if not f"{gain.module}.".startswith(inside)]
        self._inputs = inputs
        streams = [edges[name].stream for name in blocks]
        self._widths = {stream.width for stream in streams if stream is not None}
        self._width = min(self._widths)
        self._delta = torch.randn(self._width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def found(self) -> Residual:
        """Return the stream; raises Refused with the reason."""
        if len(self._widths) > 1:
            raise Refused("its width changes from block to block")
        self._require_all_read()
        base = self._run()[0]
        self._require_untied()
        layers = {name.rpartition(".")[0] for name, *_ in self._probe.reads} | {gain.module for gain in self._gains}
        lookups = [name for name in self._read() if not self._probe.of(name)[0].x.is_floating_point() and self._enters(name, base)]
        entering = [name for name in self._read() if self._probe.of(name)[0].x.is_floating_point() and self._enters(name, base)]
        # A matrix of vectors that are mixed, one in each row; dimensions cannot be told apart where the weight of a linear layer is square.
        mixed = [name for name in entering if (read := self._probe.of(name)[0].read).func is not linear and read.out_dim == 1]
        writers, lookups = [name for name in entering if name not in mixed], lookups + mixed
        others = [name for name in self._tables(layers) if self._moves(name, base)]
        if not (lookups or writers or others):
            raise Refused("nothing is known that enters it before the first block")
        for name in (*lookups, *writers, *others):
            self._require_one_place(name)
        silent = self._run(
            zero=(*lookups, *writers),
            changes={self._tensor(name): torch.zeros(1).double().expand_as(self._tensor(name)) for name in others},
        )[0]
        if bool(silent.abs().max() > 1e-12):
            raise Refused("a constant is added to it")
        norms = self._norms(base)
        keeps_mean = any(stream.keeps_mean for stream in self._streams())
        try:
            readers = self._readers([gain for gain, _ in norms], (*lookups, *writers), others, Turn(self._width, keeps_mean))
        except Refused:
            if keeps_mean:
                raise
            keeps_mean = True
            readers = self._readers([gain for gain, _ in norms], (*lookups, *writers), others, Turn(self._width, keeps_mean))
        return self._together(keeps_mean, (*lookups, *others), writers, [edge for _, edge in norms], readers)

    def _require_all_read(self) -> None:
        """Raise Refused for a layer as wide as the stream that did not run: with images, say, it may touch the stream."""
        read = {name.rpartition(".")[0] for name, *_ in self._probe.reads}
        for name, part in self._module.named_modules():
            if isinstance(part, nn.Linear) and not name.startswith(self._inside) and name not in read and self._width in part.weight.shape:
                raise Refused(f"{name} did not run and may touch it")

    def _require_one_place(self, name: str) -> None:
        """Raise Refused for a module that the model has in several places, as encoder and decoder share an embedding."""
        owner = self._module.get_submodule(name.rpartition(".")[0])
        places = [place for place, part in self._module.named_modules(remove_duplicate=False) if part is owner]
        if len(places) > 1:
            raise Refused(f"{places[0]} is {places[1]} too, and what reads it there would change")

    def _require_untied(self) -> None:
        """Raise Refused where the code asks whether the head is tied to the embedding, which it is not in a rotated model."""
        config: Any = getattr(self._module, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            return
        tied: dict[Any, tuple[Tensor, int]] = {}
        untied: dict[Any, tuple[Tensor, int]] = {}
        self._run(seen=tied)
        config.tie_word_embeddings = False
        try:
            self._run(seen=untied)
        finally:
            config.tie_word_embeddings = True
        if other := next((key[0] for key, (x, _) in tied.items() if not close(untied[key][0].double(), x.double())), ""):
            raise Refused(f"{other} reads something else when tie_word_embeddings is false, as it is for a rotated model")

    def _streams(self) -> list[Any]:
        return [self._edges[name].stream for name in self._blocks]

    def _read(self) -> list[str]:
        """Names of what is read around the blocks with outputs as wide as the stream."""
        names = dict.fromkeys(name for name, *_ in self._probe.reads)
        return [name for name in names if self._probe.of(name)[0].read.outputs == self._width]

    def _tables(self, layers: set[str]) -> list[str]:
        """Parameters and buffers as wide as the stream that no product reads."""
        read = {name for name, *_ in self._probe.reads}
        buffers = {name: buffer for name, buffer in self._module.named_buffers() if not name.startswith(self._inside)}
        tensors = {**self._parameters, **buffers}
        return [
            name
            for name, tensor in tensors.items()
            if tensor.ndim
            and tensor.shape[-1] == self._width
            and tensor.is_floating_point()
            and name not in read
            and name.rpartition(".")[0] not in layers
        ]

    def _tensor(self, name: str) -> Any:
        owner, _, key = name.rpartition(".")
        return getattr(self._module.get_submodule(owner), key)

    def _run(
        self,
        *,
        giving: str = "",
        zero: Sequence[str] = (),
        turned: Sequence[str] = (),
        turn: Turn | None = None,
        changes: Mapping[Any, Tensor] | None = None,
        seen: dict[Any, tuple[Tensor, int]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The stream at the last block and what the network gives, when some products give other vectors than those recorded."""

        def answer(read: Read) -> Tensor:
            recorded = self._probe.reads.get(read.key)
            if recorded is None:
                raise Refused("tokens take another way when it changes")
            if seen is not None:
                seen[read.key] = (read.x.detach().clone(), read.x_dim)
            if read.name in zero:
                return torch.zeros_like(recorded.y)
            if read.name == giving:
                shape = [1] * recorded.y.ndim
                shape[read.y_dim] = self._width
                return recorded.y + self._delta.view(shape)
            return turn(recorded.y, read.y_dim) if turn is not None and read.name in turned else recorded.y.clone()

        with torch.no_grad(), holding(changes or {}):
            output = self._probe.run(answer=answer)
        assert self._seen.stream is not None, "a block was reached, or it would have no stream"
        # What lies beside logits, such as features of images that enter the stream, is nothing that anybody reads in another basis.
        read = output if getattr(output, "logits", None) is None else output.logits
        return self._seen.stream.clone(), [tensor.clone() for tensor in tensors_in(read) if tensor.is_floating_point()]

    def _enters(self, name: str, base: Tensor) -> bool:
        return self._is_linear(self._run(giving=name)[0] - base, name)

    def _moves(self, name: str, base: Tensor) -> bool:
        tensor = self._tensor(name)
        moved = self._is_linear(self._run(changes={tensor: tensor.data + self._delta})[0] - base, name)
        if moved and not isinstance(tensor, nn.Parameter):
            raise Refused(f"{name} is added to it and is no parameter, so that a rotated one could not be saved")
        return moved

    def _is_linear(self, change: Tensor, name: str) -> bool:
        if not bool(change.abs().max() > 0):
            return False
        if not along(change, self._delta):
            raise Refused(f"what {name} gives passes a norm or a gate before the first block")
        return True

    def _norms(self, base: Tensor) -> list[tuple[Gain, Edge]]:
        """Norms around the blocks that read the stream, with the layers that read them."""
        found = []
        for gain in self._gains:
            x = next(iter(_floats(self._inputs[gain.module])), None)
            if x is None or x.shape[-1] != self._width or not lines_of(x, base):
                continue
            sinks = self._probe.sinks(torch.ones(self._width, dtype=torch.bool), changed=gain.scaled)
            if any(not torch.equal(sink.rows_I, torch.arange(self._width)) for sink in sinks.values()):
                raise Refused(f"{gain.module} reads it, and its gain cannot move into what reads it")
            found.append((gain, Edge((gain.module,), tuple(map(_layer, sinks)), torch.arange(self._width), gain.offset)))
        return found

    def _readers(self, norms: Sequence[Gain], entering: Sequence[str], tables: Sequence[str], turn: Turn) -> tuple[str, ...]:
        plain = {gain.parameter: torch.full_like(gain.parameter, 1 - gain.offset) for gain in norms}
        plain |= {gain.bias: torch.zeros_like(gain.bias) for gain in norms if gain.bias is not None}
        before: dict[Any, tuple[Tensor, int]] = {}
        after: dict[Any, tuple[Tensor, int]] = {}
        stream, output = self._run(changes=plain, seen=before)
        arguments = {name: [tensor.clone() for tensor in given] for name, given in self._seen.arguments.items()}
        turned_tables = {self._tensor(name): turn(self._tensor(name).data) for name in tables}
        turned, output_after = self._run(turned=entering, turn=turn, changes={**plain, **turned_tables}, seen=after)
        if not close(turned, turn(stream)):
            raise Refused("a rotation of what enters it does not come out at the last block")
        for name, given in arguments.items():
            changed = [
                place for place, (one, other) in enumerate(zip(given, self._seen.arguments[name], strict=True)) if not close(other, one)
            ]
            if changed and name not in self._blocks:
                raise Refused(f"{name} of another tower reads it")
            if len(changed) > 1:
                raise Refused(f"{name} gets the stream in two arguments")
        if any(not close(other, one) for one, other in zip(output, output_after, strict=True)):
            raise Refused("the model gives the stream itself")
        return turned_reads(before, after, turn)

    def _together(
        self, keeps_mean: bool, tables: Sequence[str], writers: Sequence[str], norms: Sequence[Edge], readers: Sequence[str]
    ) -> Residual:
        """The stream around the blocks and inside each of them, by full names."""
        found: dict[str, list[str]] = {"writers": list(map(_layer, writers)), "readers": list(map(_layer, readers)), "vectors": []}
        every = list(norms)
        for name, stream in zip(self._blocks, self._streams(), strict=True):
            block = self._module.get_submodule(name)
            for key in ("writers", "readers"):
                found[key] += [f"{name}.{part}" for part in names_of_every_expert(block, getattr(stream, key))]
            found["vectors"] += [f"{name}.{part}" for part in stream.vectors]
            for edge in self._edges[name].edges:
                if edge.sources[0] in stream.norms:
                    full = [tuple(f"{name}.{part}" for part in parts) for parts in (edge.sources, edge.sinks)]
                    every.append(replace(edge, sources=full[0], sinks=full[1]))
        return Residual(
            self._width, keeps_mean, tuple(tables), tuple(found["writers"]), tuple(found["vectors"]), tuple(every), tuple(found["readers"])
        )


def _layer(name: str) -> str:
    if not name.endswith(".weight"):
        raise Refused(f"{name} touches it and is laid out otherwise than linear layers are")
    return name.removesuffix(".weight")


def _exact_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _floats(call: Call) -> list[Tensor]:
    return [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.is_floating_point()]
