"""ONNX: one graph of a denoiser with integer weights, quantized inputs and, where scales depend on the step, its row as an input."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source
from aerogel.export.onnx_graph import program
from aerogel.export.onnx_inputs import BATCH, KNOWN, STEP, TIME, Shape, dtype_of, inputs_of, unknown_inputs
from aerogel.io.load import load
from aerogel.io.save import new_folder
from aerogel.layers.linear import timestep_index_of
from aerogel.layers.lookup import Lookup
from aerogel.layers.replacement import Assigned
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model.hooks import patched
from aerogel.model.network import Network
from aerogel.numerics.scheme import PerBlock, PerGroup, PerStep, PerTensor, PerToken
from aerogel.options import Count

_LEAST, _PACKED = 18, 21
"""The first opset that the tracer writes, and the first that has integer codes of 4 bits and groups."""
ONE_FILE_BYTES = 2_000_000_000
"""Bytes of weights that fit into one protobuf, which holds 2 GiB at most."""
_PACKAGES = ("onnx", "onnx_ir", "onnxscript")


@dataclass(frozen=True)
class Onnx(Exporter):
    """One ONNX graph of a diffusion denoiser: int8 or int4 weights, QuantizeLinear and DequantizeLinear, the step's row as an input."""

    opset: Count = 21
    """Version of the operators, at least 18; groups and 4-bit values need 21."""
    pack: bool = True
    """Pack values of up to 4 bits two per byte; else they take one byte each, and engines may use int8 products."""
    size: Count | None = None
    """Height and width of the sample; None takes the sample_size of the model's config."""

    def refuse(self, source: Source) -> list[str]:
        """Absent packages, other networks than denoisers of images, and inputs, schemes and policies that a graph cannot express."""
        if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
            return [f"the package {missing[0]} is not installed: pip install 'aerogel[onnx]'"]
        master = Master.open(source.denoiser)
        if (name := str(master.config.get("_class_name", master.family.name))) not in KNOWN:
            return [f"a {name} is none of the denoisers that graphs are written of: {', '.join(KNOWN)}"]
        if not master.linears:
            return ["no layer in it is quantized"]
        if self.opset < _LEAST:
            return [f"opset is {self.opset}, expected at least {_LEAST}"]
        reasons = unknown_inputs(master.config)
        if self.size is None and not isinstance(master.config.get("sample_size"), int):
            reasons.append("its config names no single sample_size; give size")
        reasons += [f"{name}: {why}" for name, assigned in master.linears.items() if (why := _reason(assigned, self.opset))]
        if reasons or not source.policies:
            return reasons
        more = _unsupported(self._network(source), source.policies)
        return [f"the policy {name} does more than look answers up by the step: compress without it" for name in more]

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True: what a graph cannot say is refused."""
        return True

    @torch.no_grad()
    def write(self, source: Source, output: Path) -> None:
        """Write output/denoiser.onnx, and output/denoiser.json with its inputs and its list of time steps."""
        self.accept(source)
        network = self._network(source)
        lookups = _lookups(network, source.policies)
        index = timestep_index_of(network.module) or next((lookup.index for lookup in lookups.values()), None)
        time: dict[str, Shape] = {TIME: (BATCH,)} if index is None else {STEP: ()}
        inputs = inputs_of(network.config, self.size) | time
        graph = program(network, index, lookups, inputs, self.opset, self.pack and self.opset >= _PACKED)
        with new_folder(output) as target:
            save_graph(graph, target / "denoiser.onnx")
            (target / "denoiser.json").write_text(json.dumps(_described(inputs, index, self.opset), indent=2) + "\n")

    @staticmethod
    def _network(source: Source) -> Network:
        return load(source.denoiser.folder, source.families, dtype=torch.float32, lazy=False)


def save_graph(graph: Any, path: Path) -> None:
    """Write one file, or a second one beside it with the weights where they are many."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    onnx_ir.save(graph, path, external_data=f"{path.name}.data" if weights > ONE_FILE_BYTES else None)


def _reason(assigned: Assigned, opset: int) -> str | None:
    """Return why a static graph cannot express a layer's scheme, or None when it can."""
    scheme, weights, inputs = assigned.scheme, assigned.scheme.weights, assigned.scheme.inputs
    if weights.format.kind == "float":
        return f"{weights.format} weights, expected integers"
    if assigned.act_order:
        return "its groups follow activation order, blocks of DequantizeLinear follow column order"
    if isinstance(weights.granularity, PerBlock) or (isinstance(weights.granularity, PerGroup) and opset < _PACKED):
        return f"{scheme} has groups or blocks, which opset {opset} has not; groups need {_PACKED}"
    if inputs is None or (inputs.format.name == "int8" and isinstance(inputs.granularity, PerTensor | PerToken | PerStep)):
        return None
    return f"{inputs.format} inputs, expected int8 under one scale, one a token or one a step"


def _lookups(network: Network, policies: Sequence[SavedPolicy]) -> dict[str, Lookup]:
    """Return the tables that answer while the policies are on, by the full name of the module they answer for."""
    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(policy.method.on(network, policy.state))
        answers = ((name, patched(module)) for name, module in network.module.named_modules())
        return {name: answer for name, answer in answers if isinstance(answer, Lookup)}


def _unsupported(network: Network, policies: Sequence[SavedPolicy]) -> list[str]:
    """Return the names of the policies that put on something else than tables by the step, which a static graph can say."""
    found = []
    with ExitStack() as stack:
        for policy in policies:
            before = _acting(network.module)
            stack.enter_context(policy.method.on(network, policy.state))
            added = {what for what in _acting(network.module) - before if not isinstance(getattr(what, "__self__", None), TimestepIndex)}
            if not added or not all(isinstance(what, Lookup) for what in added):
                found.append(policy.name)
    return found


def _acting(module: nn.Module) -> set[Callable[..., Any]]:
    """Return the hooks and the replaced forwards of a network."""
    acting: set[Callable[..., Any]] = set()
    for part in module.modules():
        acting.update(part._forward_pre_hooks.values(), part._forward_hooks.values())
        if (answer := patched(part)) is not None:
            acting.add(answer)
    return acting


def _described(inputs: Mapping[str, Shape], index: TimestepIndex | None, opset: int) -> dict[str, Any]:
    """Return the content of denoiser.json."""
    return {
        "inputs": [
            {"name": name, "dtype": str(dtype_of(name)).removeprefix("torch."), "shape": list(shape)} for name, shape in inputs.items()
        ],
        "outputs": ["output"],
        "opset": opset,
        "step": None if index is None else {"sampler": index.sampler, "time_steps": list(index.steps)},
    }
