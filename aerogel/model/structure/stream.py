"""The residual stream of a block: which layers add to it, which norms and layers read it, and whether a rotation of it passes.

Legend: D width of the stream.

Whatever could write the stream gives zero, every other product what it gave before: the block then passes the stream on, times a number a
token, or there is no stream. One product that gives a constant vector instead shows whether it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aerogel.model.calls import Call, tensors_in
from aerogel.model.edges import Edge
from aerogel.model.hooks import capture_inputs
from aerogel.model.structure.gains import Gain
from aerogel.model.structure.observer import Read
from aerogel.model.structure.probe import Probe, Refused, holding

_SAME = 1e-8


class Turn:
    """A random rotation of vectors (..., D), made of two reflections so that it costs no matrix."""

    def __init__(self, width: int, keeps_mean: bool = False) -> None:
        axes_2D = torch.randn(2, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        if keeps_mean:
            axes_2D -= axes_2D.mean(-1, keepdim=True)
        self.width, self._axes_2D = width, normalize(axes_2D, dim=-1)

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        """Turn the vectors that lie along a dimension."""
        turned = x.movedim(dim, -1)
        for axis_D in self._axes_2D:
            turned = turned - 2 * (turned @ axis_D)[..., None] * axis_D
        return turned.movedim(-1, dim)


@dataclass(frozen=True)
class BlockStream:
    """Parts of a block that touch the stream, by names in the block."""

    width: int
    writers: tuple[str, ...]
    """Layers whose outputs are added to the stream."""
    vectors: tuple[str, ...]
    """Parameters that are added to it as they are."""
    norms: tuple[str, ...]
    """Norms that read it; each is the source of an edge to the layers that read the norm."""
    readers: tuple[str, ...]
    """Layers that read the stream, through a norm or not."""
    keeps_mean: bool
    """True where only rotations pass that leave the mean over channels as it is."""


class StreamSearch:
    """Search for the stream of one block that was recorded."""

    def __init__(self, block: nn.Module, probe: Probe, call: Call, gains: Sequence[Gain], edges: Sequence[Edge]) -> None:
        self._block, self._probe, self._gains = block, probe, gains
        self._edges = {source: edge for edge in edges for source in edge.sources}
        self._inputs = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.is_floating_point()]
        self._place, self._result = stream_places(self._inputs, probe.base)
        self._x = self._inputs[self._place]
        self._width = self._x.shape[-1]
        self._silent: Sequence[str] = ()
        self._delta = torch.randn(self._width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        read = dict.fromkeys(name for name, *_ in probe.reads)
        self._wide = [name for name in read if probe.of(name)[0].read.outputs == self._width]
        layers = {name.rpartition(".")[0] for name in read} | {gain.module for gain in gains}
        self._silent = self._wide
        self._vectors = [
            name
            for name, parameter in probe.parameters.items()
            if name not in read and name.rpartition(".")[0] not in layers and parameter.ndim <= 2 and parameter.shape[-1] == self._width
        ]

    def found(self, unread: Sequence[str] = ()) -> BlockStream:
        """Return the block's part in the stream; raises Refused with the reason why a rotation does not pass.

        `unread` are layers that did not run: of one as wide as the stream nobody knows whether it touches it.
        """
        for name in unread:
            if self._width in self._block.get_submodule(name).get_parameter("weight").shape[:2]:
                raise Refused(f"{name} did not run and may touch it")
        norms, gains = list[str](), {gain.module: gain for gain in self._gains}
        seen: dict[str, Tensor] = {}
        with capture_inputs({name: self._block.get_submodule(name) for name in gains}, seen.setdefault):  # type: ignore[arg-type]
            silent = self._silenced()
        if not _same_line(silent, self._x):
            raise Refused("what a block passes on is not its input: a norm comes after the sum, or a gain is on the stream")
        for name, tensor in seen.items():
            if tensor.shape[-1] == self._width and bool(tensor.abs().max() > 0) and lines_of(tensor, self._x):
                norms.append(name)
        writers = [name for name in self._wide if self._writes(silent, lambda name=name: self._silenced(giving=name), name)]  # type: ignore[misc]
        vectors = [name for name in self._vectors if self._writes(silent, lambda name=name: self._silenced(adding=name), name)]  # type: ignore[misc]
        if not writers:
            raise Refused("no layer of a block adds to what passes it")
        self._silent = writers  # a gate as wide as the stream is no writer, and must not be taken away when the stream is turned
        for name in norms:
            if name not in self._edges:
                raise Refused(f"{name} reads the stream, and its gain cannot move into what reads it")
        try:
            readers, keeps_mean = self._readers([gains[name] for name in norms], Turn(self._width)), False
        except Refused:
            readers, keeps_mean = self._readers([gains[name] for name in norms], Turn(self._width, keeps_mean=True)), True
        layers = [tuple(name.removesuffix(".weight") for name in names) for names in (writers, readers)]
        return BlockStream(self._width, layers[0], tuple(vectors), tuple(norms), layers[1], keeps_mean)

    def _silenced(self, giving: str = "", adding: str = "", seen: Callable[[Read], None] = lambda read: None) -> Tensor:
        """The stream behind the block when `self._silent` products write nothing, but one product or one vector a constant."""

        def answer(read: Read) -> Tensor:
            seen(read)
            recorded = self._probe.reads.get(read.key)
            if recorded is None:
                raise Refused("tokens take another way when nothing is written")
            if read.name not in self._silent:
                return recorded.y.clone()
            y = torch.zeros_like(recorded.y)
            shape = [1] * y.ndim
            shape[read.y_dim] = self._width
            return y + self._delta.view(shape) if read.name == giving else y

        zeros = {self._probe.parameters[name]: torch.zeros_like(self._probe.parameters[name]) for name in self._vectors}
        values = {
            parameter: value + self._delta if parameter is self._probe.parameters.get(adding) else value
            for parameter, value in zeros.items()
        }
        with torch.no_grad(), holding(values):
            output = [tensor for tensor in tensors_in(self._probe.run(answer=answer)) if tensor.is_floating_point()]
        return output[self._result].clone()

    def _writes(self, silent: Tensor, run: Callable[[], Tensor], name: str) -> bool:
        change = run() - silent
        if not bool(change.abs().max() > 0):
            return False
        if not along(change, self._delta):
            raise Refused(f"what {name} writes passes a norm or a gate before it is added")
        return True

    def _readers(self, norms: Sequence[Gain], turn: Turn) -> tuple[str, ...]:
        """Products whose input turns when the stream is turned; raises Refused where something changes otherwise."""
        plain = {gain.parameter: torch.full_like(gain.parameter, 1 - gain.offset) for gain in norms}
        plain |= {gain.bias: torch.zeros_like(gain.bias) for gain in norms if gain.bias is not None}
        before: dict[Any, tuple[Tensor, int]] = {}
        after: dict[Any, tuple[Tensor, int]] = {}
        straight, kept = self._x.clone(), self._x
        with holding(plain):
            output = self._silenced(seen=lambda read: before.update({read.key: (read.x.detach().clone(), read.x_dim)}))
            kept.copy_(turn(straight))
            try:
                turned = self._silenced(seen=lambda read: after.update({read.key: (read.x.detach().clone(), read.x_dim)}))
            finally:
                kept.copy_(straight)
        if not close(turned, turn(output)):
            raise Refused("a rotation of the stream does not come out of the block as it went in")
        return turned_reads(before, after, turn)


def turned_reads(before: dict[Any, tuple[Tensor, int]], after: dict[Any, tuple[Tensor, int]], turn: Turn) -> tuple[str, ...]:
    """Names of the parameters whose products read turned inputs; raises Refused for an input that changed in another way."""
    readers: dict[str, None] = {}
    for key, (x, dim) in before.items():
        if key not in after:
            raise Refused(f"{key[0]} is not read when the stream is turned")
        now = after[key][0]
        if torch.equal(x, now) or not x.is_floating_point():
            continue
        if x.shape[dim] == turn.width and close(now, turn(x, dim)):
            readers[key[0]] = None
        elif not close(now, x):
            raise Refused(f"{key[0]} reads the stream mixed with something else")
    return tuple(readers)


def stream_places(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Places of the stream among float inputs and outputs: the first input that has the shape of an output."""
    shapes = [tensor.shape for tensor in outputs]
    for place, tensor in enumerate(inputs):
        if tensor.ndim >= 2 and tensor.shape in shapes:
            return place, shapes.index(tensor.shape)
    raise Refused("no input of a block has the shape of an output")


def close(mine: Tensor, theirs: Tensor) -> bool:
    return not theirs.numel() or bool((mine - theirs).abs().max() <= _SAME * theirs.abs().max())


def along(change: Tensor, vector: Tensor) -> bool:
    """Return True for vectors that are all this one, times a number a token."""
    flat = change.reshape(-1, change.shape[-1])
    factor = (flat @ vector) / (vector @ vector)
    return bool((flat - factor[:, None] * vector).abs().max() <= _SAME * flat.abs().max())


def _same_line(mine: Tensor, theirs: Tensor) -> bool:
    """Return True for tensors that are the same but for a number a token, which is not zero for all."""
    a, b = mine.reshape(-1, mine.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
    factor = (a * b).sum(-1) / b.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return bool(a.abs().max() > 0) and bool((a - factor[:, None] * b).abs().max() <= _SAME * a.abs().max())


def lines_of(some: Tensor, stream: Tensor) -> bool:
    """Return True where every vector is one of the stream's, times a number."""
    a, b = (normalize(tensor.reshape(-1, tensor.shape[-1]), dim=-1) for tensor in (some, stream))
    return bool(((a @ b.T).abs().amax(-1) > 1 - 1e-10).all())
