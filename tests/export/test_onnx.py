"""ONNX graphs of denoisers: run by onnxruntime they give our own numbers, row by row, and hold codes where we do.

A layer of the graph sums floats in another order than torch, which shifts a number by some 1e-7; where it then falls to the other side of
a rounding, the sample it belongs to moves by a step of some grid. Networks of random weights are the worst case of that.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import aerogel
from aerogel.cli import commands as cli
from aerogel.engine.exporting import source_of
from aerogel.errors import AerogelError
from aerogel.export import onnx as exporting
from aerogel.export.onnx import Onnx
from aerogel.export.onnx_inputs import inputs_of, nested, unknown_inputs
from aerogel.io.record import files
from aerogel.layers.linear import QuantLinear, cache_dequantized, timestep_index_of
from aerogel.methods.diffusion.temporal_cache import TemporalCache
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.saved import network as rounded
from tests.saved import save
from tests.tiny import FAMILIES, output

STEPS = (980, 760, 300, 20)
CODES = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
EXACT, FLIPPED = 3e-6, 0.1
"""Largest differences relative to a sample's largest number: of sums in another order, and after a rounding that fell otherwise."""


@dataclass
class Written:
    """A compressed folder, and the graph that was made of it."""

    network: Network
    folder: Path
    """Where the graph is."""
    session: onnxruntime.InferenceSession

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.folder / "denoiser.onnx").graph

    @property
    def layers(self) -> dict[str, QuantLinear]:
        return {name: part for name, part in self.network.module.named_modules() if isinstance(part, QuantLinear)}

    def feed(self, call: Call) -> dict[str, Any]:
        step = int(call.kwargs["timestep"][0])
        given = call.kwargs | {"step": torch.tensor(STEPS.index(step)), "timestep": call.kwargs["timestep"].float()}
        return {one.name: given[one.name].numpy() for one in self.session.get_inputs()}

    def theirs(self, call: Call, **other: Any) -> Tensor:
        return torch.from_numpy(self.session.run(None, self.feed(call) | other)[0])

    def ours(self, call: Call) -> Tensor:
        with cache_dequantized(self.network.module):
            return output(self.network.module, call)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The default rounds the inputs of some products with float inputs to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def calls(kind: str, batch: int, seed: int = 0) -> list[Call]:
    """One call a step with samples of their own; of a text the second half of the samples has less."""
    made = []
    for number, step in enumerate(STEPS):
        generator = torch.Generator().manual_seed(100 * seed + number)
        (call,) = FAMILIES[kind].calls(1)
        inputs: dict[str, Any] = {}
        for name, tensor in call.kwargs.items():
            shape = (batch, *tensor.shape[1:])
            whole = not tensor.is_floating_point()
            inputs[name] = torch.randint(0, 10, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        if kind == "pixart":
            inputs["encoder_attention_mask"] = torch.ones(batch, 7)
            inputs["encoder_attention_mask"][batch // 2 :, 4:] = 0
        made.append(Call((), inputs | {"timestep": torch.full((batch,), step)}))
    return made


def made(kind: str, steps: list[dict[str, Any]], folder: Path, chosen: tuple[bool, ...] = ()) -> Written:
    """Compress by a recipe and export; `chosen` are the steps at which tables answer, whichever way is nearer."""
    aerogel.compress(FAMILIES[kind].build(), {"steps": steps}, samples=calls(kind, 2), measures=(), output=folder / "master")
    if chosen:
        state = load_file(folder / "master/aerogel/policies.safetensors")
        changed = {key: torch.tensor(chosen) if "chosen" in key else kept for key, kept in state.items()}
        save_file(changed, folder / "master/aerogel/policies.safetensors")
        record = files.read(folder / "master")
        now = {name: files.checksum_of(folder / "master" / name) for name in record.checksums}
        files.write(folder / "master", record.replaced(checksums=now))
    done = CliRunner().invoke(cli.app, ["export", str(folder / "master"), "-f", "onnx", "-o", str(folder / "graph")])
    assert done.exit_code == 0, done.output
    return Written(aerogel.load(folder / "master"), folder / "graph", session(folder / "graph/denoiser.onnx"))


W4 = "W4A16_CHANNEL_ASYM"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every layer in 4 bits with 8-bit inputs: the path's own range a step, one range in all others."""
    everything = {"rtn": {"scheme": W4, "targets": ["Linear", "Conv2d"]}}
    recipe = [{"tiar": {"scheme": W4, "steps": 5}}, everything, {"activation_ranges": {"ignore": ["*time_emb*"], "steps": 0}}, {"fsc": {}}]
    return made("unet", recipe, tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Many schemes of weights; the modulation comes from a table at some steps and from the path at others."""
    schemes = {"*.attn1.*": "W4A16_G32_ASYM", "*.ff.*": "W8A8_ASYM_AFFINE", "*.to_q": "W3A16_CHANNEL"}
    recipe = [
        {"tiar": {"scheme": "W8A16_CHANNEL_ASYM", "steps": 5}},
        {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["transformer_blocks.*"], "overrides": schemes}},
        {"fsc": {}},
        {"temporal_cache": {"dtype": "int6", "choose": "layer_step"}},
    ]
    return made("pixart", recipe, tmp_path_factory.mktemp("pixart"), chosen=(True, False, True, False))


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """No clock; inputs are measured token by token."""
    return made("dit", [{"rtn": {"scheme": "W8A8"}}], tmp_path_factory.mktemp("dit"))


def errors(written: Written, kind: str, batch: int) -> Tensor:
    """Of every sample at every step: the largest difference, relative to its largest number."""
    found = []
    for call in calls(kind, batch, seed=batch):
        ours, theirs = (answer.flatten(1) for answer in (written.ours(call), written.theirs(call)))
        found.append((ours - theirs).abs().amax(1) / ours.abs().amax(1))
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "pixart", "dit"])
def test_samples_are_those_of_our_arithmetic_in_batches_of_any_size(kind: str, request: pytest.FixtureRequest) -> None:
    written: Written = request.getfixturevalue(kind)
    found = torch.cat([errors(written, kind, batch) for batch in (1, 3)])
    assert found.quantile(0.1) < EXACT, "in the tiny UNet about half of the samples meet a rounding that falls otherwise"
    assert found.max() < FLIPPED


@pytest.mark.slow
def test_a_layer_reads_its_range_off_the_row_of_the_step(unet: Written, tmp_path: Path) -> None:
    name = "mid_block.resnets.0.time_emb_proj"
    layer = unet.layers[name]
    model = onnx.load(unet.folder / "denoiser.onnx")
    (product,) = product_of(model.graph, f"denoiser.{name}.inner.codes.int4").output
    model.graph.output.append(onnx.helper.make_tensor_value_info(product, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "more.onnx")
    more = session(tmp_path / "more.onnx")
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:1]))
    clock = timestep_index_of(unet.network.module)
    assert clock is not None
    for row, call in enumerate(calls("unet", 2)):
        unet.ours(call)
        theirs = torch.from_numpy(more.run([product], unet.feed(call))[0]) + layer.bias
        distances = []
        for other in range(len(STEPS)):
            with clock.at((other,)), cache_dequantized(layer):
                distances.append(float((layer.forward(seen[-1]) - theirs).abs().max() / theirs.abs().max()))
        right = distances.pop(row)
        assert right < EXACT
        assert min(distances) > 100 * EXACT


def test_another_row_is_another_picture_and_there_are_no_more_rows_than_steps(unet: Written) -> None:
    call = calls("unet", 2)[0]
    right = unet.theirs(call)
    for row in range(1, len(STEPS)):
        assert (unet.theirs(call, step=np.array(row)) - right).norm() > FLIPPED * right.norm()
    with pytest.raises(Exception, match="indices element out of data bounds"):
        unet.theirs(call, step=np.array(len(STEPS)))


@pytest.mark.parametrize("kind", ["unet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pixart", "dit"))])
def test_every_quantized_layer_is_codes_with_a_scale_and_so_are_its_inputs(kind: str, request: pytest.FixtureRequest) -> None:
    written: Written = request.getfixturevalue(kind)
    graph, layers = written.graph, written.layers
    kept = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        node.input[0]: kept[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in kept and kept[node.input[0]].data_type in CODES
    }
    sizes = Counter((layer.codes().numel(), layer.scheme.bits <= 4) for layer in layers.values())
    assert Counter((int(np.prod(tensor.dims)), tensor.data_type == CODES[1]) for tensor in weights.values()) == sizes
    for codes in weights:
        name = codes.removeprefix("denoiser.").partition(".codes")[0].replace(".inner", "")
        x = product_of(graph, codes).input[0]
        rounds = [node.op_type for node in before(graph, x)][:2] == ["DequantizeLinear", "QuantizeLinear"]
        assert rounds == (layers.pop(name).scheme.inputs is not None), name
    assert not layers
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert not [name for name in floats if any(name.startswith(f"denoiser.{layer}.weight") for layer in written.layers)]


def product_of(graph: onnx.GraphProto, codes: str) -> onnx.NodeProto:
    """The MatMul or Conv that the codes of a weight are for."""
    value = next(node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == codes)
    while True:
        (node,) = (node for node in graph.node if value in node.input)
        if node.op_type in ("MatMul", "Conv"):
            return node
        assert node.op_type == "Reshape"
        (value,) = node.output


def before(graph: onnx.GraphProto, value: str) -> Iterator[onnx.NodeProto]:
    """The nodes that a number comes through, last one first, shapes apart."""
    while (node := next((node for node in graph.node if value in node.output), None)) is not None:
        if node.op_type != "Reshape":
            yield node
        value = node.input[0]


def test_a_table_is_codes_of_all_steps(pixart: Written) -> None:
    tables = [tensor for tensor in pixart.graph.initializer if tensor.name.endswith(".table")]
    assert [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in tables] == [
        ("denoiser.adaln_single.linear.table", onnx.TensorProto.INT8, (len(STEPS), 6 * 64))
    ]


def test_inputs_are_said_in_the_file_beside_the_graph(unet: Written, pixart: Written, dit: Written) -> None:
    for written in (unet, pixart, dit):
        said = json.loads((written.folder / "denoiser.json").read_text())
        there = [(one.name, one.shape, one.type) for one in written.session.get_inputs()]
        kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        assert there == [(one["name"], one["shape"], kinds[one["dtype"]]) for one in said["inputs"]]
        assert [one.name for one in written.session.get_outputs()] == said["outputs"]
    assert json.loads((unet.folder / "denoiser.json").read_text())["step"] == {"sampler": "", "time_steps": list(STEPS)}
    assert json.loads((dit.folder / "denoiser.json").read_text())["step"] is None


def test_the_graph_is_sound_and_says_nothing_of_this_machine(unet: Written) -> None:
    path = unet.folder / "denoiser.onnx"
    onnx.checker.check_model(path, full_check=True)
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    assert str(Path(aerogel.__file__).parent).encode() not in path.read_bytes()


def test_many_weights_go_into_a_file_of_their_own(dit: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONE_FILE_BYTES", 1000)
    exporting.save_graph(onnx_ir.load(dit.folder / "denoiser.onnx"), tmp_path / "denoiser.onnx")
    assert (tmp_path / "denoiser.onnx.data").stat().st_size > (tmp_path / "denoiser.onnx").stat().st_size / 2
    call = calls("dit", 1)[0]
    assert torch.equal(torch.from_numpy(session(tmp_path / "denoiser.onnx").run(None, dit.feed(call))[0]), dit.theirs(call))


@pytest.mark.parametrize(
    ("kind", "scheme", "act_order", "options", "word"),
    [
        ("llama", "W4A16_G32", False, {}, "a llama is none of the denoisers"),
        ("wan", "W4A16_G32", False, {}, "a WanTransformer3DModel is none of the denoisers"),
        ("dit", None, False, {}, "no layer in it is quantized"),
        ("dit", "FP8_DYNAMIC", False, {}, "fp8_e4m3 weights, expected integers"),
        ("dit", "W4A16_G32", True, {}, "its groups follow activation order"),
        ("dit", "W4A16_G32", False, {"opset": 20}, "groups need 21"),
        ("dit", "W8A8", False, {"opset": 17}, "opset is 17, expected at least 18"),
    ],
)
def test_what_a_graph_cannot_say_is_refused_before_any_work(
    kind: str, scheme: str | None, act_order: bool, options: dict[str, int], word: str, tmp_path: Path
) -> None:
    save(rounded(scheme, kind, act_order=act_order), tmp_path / "master")
    assert all(word in reason for reason in Onnx(**options).refuse(source_of(tmp_path / "master")))
    with pytest.raises(AerogelError, match=f"cannot be written as Onnx: .*{word}"):
        Onnx(**options).write(source_of(tmp_path / "master"), tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_absent_packages_and_policies_with_other_effects_are_refused(pixart: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    master = pixart.folder.parent / "master"
    assert Onnx().refuse(source_of(master)) == []
    with monkeypatch.context() as patch:
        patch.setattr(TemporalCache, "on", lambda *_: nullcontext())
        assert Onnx().refuse(source_of(master)) == [
            "the policy temporal_cache does more than look answers up by the step: compress without it"
        ]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert Onnx().refuse(source_of(master)) == ["the package onnxscript is not installed: pip install 'aerogel[onnx]'"]


def test_inputs_follow_the_config_of_the_network() -> None:
    xl = {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 128, "cross_attention_dim": 2048,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    shapes = inputs_of(xl, 64)
    assert shapes == {
        "sample": ("batch", 4, 64, 64), "encoder_hidden_states": ("batch", "tokens", 2048),
        "added_cond_kwargs.text_embeds": ("batch", 1280), "added_cond_kwargs.time_ids": ("batch", 6),
    }  # fmt: skip
    assert set(nested(shapes)["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert unknown_inputs(xl) == []
    (reason,) = unknown_inputs(xl | {"time_cond_proj_dim": 256})
    assert reason == "it takes a guidance scale (time_cond_proj_dim=256)"
    large = {"_class_name": "PixArtTransformer2DModel", "in_channels": 4, "sample_size": 128, "caption_channels": 4096}
    names = list(inputs_of(large | {"use_additional_conditions": None}, None))
    assert names[-2:] == ["added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"]
    assert len(inputs_of(large | {"use_additional_conditions": False}, None)) == 3
