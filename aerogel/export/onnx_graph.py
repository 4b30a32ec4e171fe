"""The graph of a denoiser: torch traces its own forward, with quantized layers and answers by the step said in ONNX operators.

Codes of weights go through DequantizeLinear; static inputs through QuantizeLinear and back. What depends on the step is a table from
which Gather takes the row of the input `step`. O outputs, I inputs, G groups, T steps, C width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from aerogel.export.onnx_inputs import BATCH, STEP, TIME, TOKENS, Shape, example, nested
from aerogel.layers.conv import QuantConv2d
from aerogel.layers.linear import QuantLinear
from aerogel.layers.lookup import Lookup
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.quantize import Grid, dynamic_grid
from aerogel.numerics.scheme import PerGroup, PerStep, PerTensor


class _Row:
    """The row of the tables, while the network is traced."""

    step: Tensor


def _round_trip(x: Tensor, scale: Tensor, zero: Tensor, **attributes: int) -> Tensor:
    """Quantize and dequantize."""
    codes: Tensor = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), {**attributes}, dtype=torch.int8, shape=x.shape)
    return _dequantize(codes, scale, zero, **attributes)


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, **attributes: int) -> Tensor:
    given = (codes, scale) if zero is None else (codes, scale, zero)
    out: Tensor = torch.onnx.ops.symbolic("DequantizeLinear", given, {**attributes}, dtype=torch.float32, shape=codes.shape)
    return out


class _Layer(nn.Module):
    """A quantized linear or convolution in ONNX operators: matrices lie transposed, as MatMul reads them, kernels as Conv does."""

    def __init__(self, layer: QuantLinear, row: _Row) -> None:
        super().__init__()
        self.row, self.inputs = row, layer.scheme.inputs
        self.window = layer.window if isinstance(layer, QuantConv2d) else None
        parts, self.attributes = _weight(layer)
        for name, part in parts.items():
            self.register_buffer(name, None if part is None else part.contiguous())
        input_grid = layer.stored().input_grid
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("input_scale", None if input_grid is None else input_grid.scale)
        self.register_buffer("input_zero", None if input_grid is None else _zero(input_grid))
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.bias: Tensor | None
        self.input_scale: Tensor
        self.input_zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer by operators of ONNX."""
        x = self._rounded(x)
        weight = _dequantize(self.codes, self.scale, self.zero, **self.attributes)
        if self.window is None:
            return x @ weight if self.bias is None else x @ weight + self.bias
        window = self.window
        kernel_OCHW = weight.unflatten(1, (-1, *window.kernel)) if weight.ndim == 2 else weight
        return conv2d(x, kernel_OCHW, self.bias, window.stride, window.padding, window.dilation, window.groups)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            return x
        if self.inputs.dynamic:
            x_TI = x.flatten(0, -2)
            grid = dynamic_grid(x_TI, self.inputs)
            return _round_trip(x_TI, grid.scale.flatten(), _zero(grid).flatten(), axis=0).view(x.shape)
        if isinstance(self.inputs.granularity, PerStep):
            return _round_trip(x, self.input_scale[self.row.step], self.input_zero[self.row.step])
        return _round_trip(x, self.input_scale, self.input_zero)


def _weight(layer: QuantLinear) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    """A weight as DequantizeLinear takes it: integer codes, scale and zero, and the operator's attributes.

    Kernels have their own shape, but matrices where groups run over channels and kernel together.
    """
    codes_OI, grid, _, _ = layer.stored()
    outputs = 0 if isinstance(layer, QuantConv2d) else 1
    parts: dict[str, Tensor | None] = {"codes": codes_OI, "scale": grid.scale, "zero": grid.zero}
    if outputs == 1:
        parts = {name: part.T if part is not None and part.ndim == 2 else part for name, part in parts.items()}
    granularity = layer.scheme.weights.granularity
    if isinstance(granularity, PerGroup):
        return parts, {"axis": 1 - outputs, "block_size": granularity.size}
    if isinstance(layer, QuantConv2d):
        parts["codes"] = codes_OI.unflatten(1, (-1, *layer.window.kernel))
    if isinstance(granularity, PerTensor):
        return parts, {}
    flat = {name: None if part is None else part.flatten() for name, part in parts.items() if name != "codes"}
    return parts | flat, {"axis": outputs}


def _zero(grid: Grid) -> Tensor:
    """The zero points, which QuantizeLinear reads its type off, of a grid that may have none."""
    return torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero is None else grid.zero


class _ByStep(nn.Module):
    """A module that depends on the step alone: run on one sample or looked up in a table, and spread over the batch."""

    def __init__(self, inner: nn.Module | None, row: _Row, sinusoid_TC: Tensor | None, lookup: Lookup | None) -> None:
        super().__init__()
        self.row, self.inner = row, inner
        grid = None if lookup is None else lookup.grid
        self.register_buffer("sinusoid", sinusoid_TC)
        self.register_buffer("table", None if lookup is None else lookup.kept_TC)
        self.register_buffer("chosen", None if lookup is None else lookup.chosen_T)
        self.register_buffer("scale", None if grid is None else grid.scale.flatten())
        self.register_buffer("zero", None if grid is None or grid.zero is None else grid.zero.flatten())
        self.sinusoid: Tensor | None
        self.table: Tensor | None
        self.chosen: Tensor
        self.scale: Tensor | None
        self.zero: Tensor | None

    def forward(self, x_NC: Tensor, *_: Any) -> Tensor:
        """The answer of the row, for all samples."""
        step = self.row.step
        answer_1C = x_NC[:1] if self.sinusoid is None else self.sinusoid[step][None]
        if self.inner is not None:
            answer_1C = self.inner(answer_1C)
        if self.table is not None:
            looked_1C = self._looked(self.table, step)[None]
            answer_1C = looked_1C if self.inner is None else torch.where(self.chosen[step], looked_1C, answer_1C)
        return answer_1C.expand(x_NC.shape[0], -1)

    def _looked(self, table_TC: Tensor, step: Tensor) -> Tensor:
        if self.scale is None:
            return table_TC[step].float()
        return _dequantize(table_TC[step], self.scale[step], None if self.zero is None else self.zero[step])


class _Traced(nn.Module):
    """A denoiser that takes the graph's inputs in one dictionary."""

    def __init__(self, denoiser: nn.Module, inputs: Mapping[str, Shape], index: TimestepIndex | None, row: _Row) -> None:
        super().__init__()
        self.denoiser, self.inputs, self.index, self.row = denoiser, inputs, index, row

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The denoiser's answer."""
        self._agree(inputs)
        given = nested(inputs)
        if self.index is not None:
            self.row.step = given.pop(STEP)
            # Nobody reads the time step: the embedder's sinusoids are in a table.
            first = next(iter(inputs.values()))
            given[TIME] = first.new_full((first.shape[0],), self.index.steps[0])
        answer: Tensor = self.denoiser(**given, return_dict=False)[0]
        return answer

    def _agree(self, inputs: Mapping[str, Tensor]) -> None:
        """Let the tracer know at once that axes of one name are of one length: it finds out too late for some views."""
        lengths: dict[str, int] = {}
        for name, shape in self.inputs.items():
            for axis, length in zip(shape, inputs[name].shape, strict=True):
                if isinstance(axis, str):
                    torch._check(lengths.setdefault(axis, length) == length)


def _traceable(network: Network, index: TimestepIndex | None, lookups: Mapping[str, Lookup], inputs: Mapping[str, Shape]) -> _Traced:
    """Change a network's layers for good into what is traced."""
    row, module = _Row(), network.module
    by_step = {} if index is None else _by_step(network, index, inputs)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantLinear):
            module.set_submodule(name, _Layer(layer, row))
    for name, sinusoid_TC in by_step.items():
        lookup = lookups.get(name)
        inner = None if lookup is not None and bool(lookup.chosen_T.all()) else module.get_submodule(name)
        module.set_submodule(name, _ByStep(inner, row, sinusoid_TC, lookup))
    return _Traced(module.eval(), inputs, index, row)


def _by_step(network: Network, index: TimestepIndex, inputs: Mapping[str, Shape]) -> dict[str, Tensor | None]:
    """The modules that depend on the step alone, embedders with the sinusoid_TC that they get; the timestep index leaves the network."""
    path = time_path.find(network)
    given = nested({name: example(name, shape) for name, shape in inputs.items() if name != STEP})
    call = Call((), given | {TIME: torch.full((2,), index.steps[0])})
    sinusoid_TC = time_path.sinusoids(network, path, call, index.steps)
    index.untrack(network.module)
    return dict.fromkeys(path.embedders, sinusoid_TC) | dict.fromkeys(path.projections)


def program(
    network: Network, index: TimestepIndex | None, lookups: Mapping[str, Lookup], inputs: Mapping[str, Shape], opset: int, pack: bool
) -> Any:
    """Trace a network, whose layers are changed for good, and return the graph as an onnx_ir model.

    It takes `inputs`, among them a row of the timestep index where there is one; `lookups` are answers by the step, by the full name of
    a module. With `pack` weights whose integer codes fit into 4 bits take no more.
    """
    traced = _traceable(network, index, lookups, inputs)
    axes = {BATCH: torch.export.Dim(BATCH), TOKENS: torch.export.Dim(TOKENS)}
    shapes = {
        name: {place: axes[length] for place, length in enumerate(shape) if isinstance(length, str)} for name, shape in inputs.items()
    }
    with _quiet():
        made = torch.onnx.export(
            traced,
            kwargs={"inputs": {name: example(name, shape) for name, shape in inputs.items()}},
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes={"inputs": shapes},
            opset_version=opset,
            custom_translation_table={torch.ops.aten.squeeze.dim: _squeeze},
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    if pack:
        _pack(made.model)
    _anonymise(made.model)
    return made.model


def _squeeze(x: Any, dim: int) -> Any:
    """torch leaves an axis that is longer than one alone; the operator of ONNX, and the tracer's own translation, do not."""
    from onnxscript import opset18

    return opset18.Squeeze(x, [dim]) if x.shape[dim] == 1 else opset18.Identity(x)


def _pack(model: Any) -> None:
    """Give weights whose integer codes and zero points fit into 4 bits the type that packs two in a byte."""
    import onnx_ir

    int4 = onnx_ir.DataType.INT4.numpy()

    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        places = [place for place, value in enumerate(node.inputs) if place != 1 and value is not None]
        kept = [node.inputs[place].const_value for place in places]
        if any(tensor is None or not _fits(tensor.numpy()) for tensor in kept):
            continue
        for place, tensor in zip(places, kept, strict=True):
            name = f"{tensor.name}.int4" if place == 0 else f"{node.inputs[0].name}.zero.int4"
            value = onnx_ir.val(name, const_value=onnx_ir.tensor(tensor.numpy().astype(int4), name=name))
            model.graph.register_initializer(value)
            node.replace_input_with(place, value)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def _fits(codes: Any) -> bool:
    return bool(codes.dtype.name == "int8" and codes.min() >= -8 and codes.max() <= 7)


def _anonymise(model: Any) -> None:
    """Drop the tracer's notes, among them places of files on this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for thing in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        thing.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks about its own parts; its errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
