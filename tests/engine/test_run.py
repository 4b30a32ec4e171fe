"""The engine: one loop over steps, the same bits from a live network and from a folder, and a plan that keeps its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from aerogel.engine import policies
from aerogel.engine import run as engine
from aerogel.engine.calibration import Samples, prepare
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.engine.progress import Event
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.evaluate.perplexity import Perplexity
from aerogel.layers.linear import QuantLinear
from aerogel.layers.slots import slots
from aerogel.methods.base import RuntimePolicy
from aerogel.model.calls import Call
from aerogel.recipe import Recipe
from tests.folders import digests, model_folder, text_file
from tests.tiny import FAMILIES, output

RTN = {"name": "rounded", "steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
GPTQ = {"name": "compensated", "steps": [{"gptq": {"scheme": "W4A16_G32"}}]}
MIXED = {"name": "mixed", "steps": [{"rtn": {"scheme": "W4A16_G32_ASYM", "overrides": {"*.o_proj": "W8A8", "*.down_proj": "W3A16_G64"}}}]}
HEAD = {"name": "head", "steps": [{"gptq": {"scheme": "W8A16_G32", "ignore": []}}]}
CALLS = FAMILIES["llama"].calls(3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    text_file(folder / "text.txt", 20000)
    return model_folder(folder / "model", num_hidden_layers=3)


def samples(source: Path) -> Samples:
    return Samples(source.parent / "text.txt", count=6, length=24)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved folder."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("recipe", [RTN, GPTQ, MIXED, HEAD], ids=lambda recipe: recipe["name"])
def test_a_folder_gives_the_bits_of_a_live_network(source: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    lazily, live = tmp_path / "lazily", tmp_path / "live"
    before = digests(source)
    first = compress(source, recipe, output=lazily, samples=samples(source), measures=())
    opened = open_model(source, lazy=False)
    opened.checkpoint = None
    second = compress(opened, recipe, output=live, samples=samples(source), measures=())
    assert digests(source) == before
    found, expected = tensors(lazily), tensors(live)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [line["name"] for line in first.journal] == [line["name"] for line in second.journal]
    assert torch.equal(output(first.network.module, CALLS[0]), output(second.network.module, CALLS[0]))


@pytest.mark.parametrize("recipe", [RTN, GPTQ, MIXED, HEAD], ids=lambda recipe: recipe["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_predicts_the_size_to_the_byte(source: Path, tmp_path: Path, recipe: dict[str, Any], dtype: torch.dtype) -> None:
    folder = model_folder(tmp_path / "model", dtype=dtype)
    made = plan(folder, recipe)
    compress(folder, recipe, output=tmp_path / "out", samples=samples(source), measures=())
    saved = tensors(tmp_path / "out")
    assert made.predicted_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert made.source_bytes == sum(tensor.nbytes for tensor in tensors(folder).values())
    assert {linear.name for linear in made.touched} == {name.removesuffix(".weight_scale") for name in saved if name.endswith("_scale")}


def test_the_plan_changes_no_weight_and_says_why_layers_are_kept(source: Path) -> None:
    network = open_model(source, lazy=False)
    before = {slot.name: slot.tensor.clone() for slot in slots(network.module)}
    made = plan(network, {"steps": [{"rtn": {"scheme": "W4A16_G32", "targets": ["*_proj"], "ignore": ["*.0.mlp.*"]}}]})
    assert all(torch.equal(slot.tensor, before[slot.name]) for slot in slots(network.module))
    reasons = {kept.name: kept.reason for kept in made.kept}
    assert reasons["model.layers.0.mlp.up_proj"] == "ignored by the recipe"
    assert reasons["lm_head"] == "not among the recipe's targets"
    assert reasons["model.embed_tokens"] == "an embedding, not a linear"
    reached = sum(linear.inputs * linear.outputs for linear in made.touched)
    assert made.share_reached == reached / sum(parameter.numel() for parameter in network.module.parameters())
    assert len(made.touched) == 3 * 7 - 3
    assert json.loads(json.dumps(made.as_dict()))["share_reached"] == made.share_reached


def test_the_plan_refuses_what_does_not_divide(source: Path) -> None:
    made = plan(source, RTN, overrides=["rtn.scheme=W4A16_G48"])
    assert made.touched == ()
    assert made.problems[0].startswith("model.layers.0.self_attn.q_proj and 17 other linear layers cannot take W4A16_G48: 64 inputs")
    assert "(groups that fit: 32, 64)" in made.problems[0]
    with pytest.raises(AerogelError, match=r"recipe 'rounded': model\.layers\.0\.self_attn\.q_proj .* \(and 1 more"):
        compress(source, RTN, overrides=["rtn.scheme=W4A16_G48"], measures=())


def test_the_plan_refuses_what_reaches_nothing(source: Path) -> None:
    assert plan(source, RTN, overrides=["rtn.targets=[Conv2d]"]).problems == (
        "rtn reaches no linear layer of this model; check its targets and ignore",
    )


def test_neighbouring_block_methods_share_one_walk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    class Counted(engine.Walk):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            walks.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(engine, "Walk", Counted)
    smooth = {"steps": [{"smoothquant": {}}, {"rtn": {"scheme": "W8A8"}}]}
    result = compress(source, smooth, samples=samples(source), measures=())
    assert len(walks) == 1
    assert {line["method"] for line in result.journal} == {"smoothquant", "rtn"}
    assert {line["block"] for line in result.journal} == {f"model.layers.{number}" for number in range(3)}


def test_methods_that_read_weights_only_need_no_text(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    result = compress(model, RTN, measures=())
    assert result.network.module is model
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    assert "fingerprint" not in result.facts["provenance"]["calibration"]
    with pytest.raises(AerogelError, match="no tokenizer for calibration text; give recorded calls"):
        compress(FAMILIES["llama"].build(), GPTQ, measures=())
    compress(FAMILIES["llama"].build(), GPTQ, samples=CALLS, measures=())


def test_memory_holds_the_block_in_hand_only(source: Path) -> None:
    network = open_model(source)
    most = []

    def resident(event: Event) -> None:
        if event.stage == "compress" and event.what:
            weights = {name: [p.is_meta for p in block.parameters()] for name, block in network.blocks().items()}
            most.append([name for name, meta in weights.items() if not all(meta)])

    compress(network, GPTQ, samples=samples(source), measures=(), tell=resident)
    assert most == [["model.layers.0"], ["model.layers.1"], ["model.layers.2"]]


def test_a_result_without_output_is_whole(source: Path, tmp_path: Path) -> None:
    result = compress(source, GPTQ, samples=samples(source), measures=())
    kept = compress(source, GPTQ, samples=samples(source), measures=(), output=tmp_path / "kept")
    assert result.save(tmp_path / "saved") == tmp_path / "saved"
    assert tensors(tmp_path / "saved").keys() == tensors(tmp_path / "kept").keys()
    assert torch.equal(output(result.network.module, CALLS[1]), output(kept.network.module, CALLS[1]))
    with pytest.raises(AerogelError, match="not empty"):
        result.save(tmp_path / "saved")


def test_the_record_says_what_was_done(source: Path, tmp_path: Path) -> None:
    compress(
        source,
        GPTQ,
        output=tmp_path / "out",
        samples=samples(source),
        measures=("size", Perplexity(source=str(source.parent / "text.txt"))),
    )
    facts = json.loads((tmp_path / "out" / "aerogel.json").read_text())
    assert facts["model"]["family"] == "llama"
    assert facts["recipe"] == Recipe.parse(GPTQ).as_dict()
    assert facts["provenance"]["calibration"]["count"] == 6
    assert facts["provenance"]["calibration"]["fingerprint"].startswith("sha256:")
    assert len(facts["journal"]) == facts["plan"]["layers"] == 21
    assert {(line["method"], line["scheme"]) for line in facts["journal"]} == {("gptq", "W4A16_G32")}
    assert set(facts["checksums"]) == {"model.safetensors"}
    for whose in ("original", "compressed"):
        assert facts["metrics"][whose]["perplexity"]["perplexity"] > 1
    assert facts["metrics"]["compressed"]["size"]["disk_bytes"] < facts["metrics"]["original"]["size"]["disk_bytes"]
    assert set(facts["timings"]) == {"load", "check", "compress", "save", "evaluate"}


def test_a_live_module_is_measured_before_it_changes(source: Path) -> None:
    opened = open_model(source, lazy=False)
    live = open_model((opened.module, opened.processor))
    measure = Perplexity(source=str(source.parent / "text.txt"))
    expected = measure.measure(live)["perplexity"]
    result = compress(live, RTN, measures=(measure,))
    assert result.metrics["original"]["perplexity"]["perplexity"] == expected
    assert result.metrics["compressed"]["perplexity"]["perplexity"] != expected


def test_reports_go_to_the_folder_or_where_told(source: Path, tmp_path: Path) -> None:
    result = compress(FAMILIES["llama"].build(), RTN, measures=())
    with pytest.raises(AerogelError, match="is in memory only"):
        result.report()
    assert "<html" in result.report(tmp_path / "live.html").read_text()
    saved = compress(source, RTN, output=tmp_path / "out", measures=())
    assert saved.report() == tmp_path / "out" / "report.html"


POLICY = '''
"""Adds what the embedding gives on average to the embedding's outputs, for tests."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from aerogel.methods.base import RuntimePolicy
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False)
class ShiftState(PolicyState):
    """The mean of the embeddings."""

    mean: Tensor
    calls: int


@dataclass(frozen=True)
class Shift(RuntimePolicy[ShiftState]):
    """Shifts embeddings by their mean."""

    state = ShiftState

    strength: float = 1.0
    """How much of the mean."""

    def calibrate(self, network, calls):
        total = sum(network.module.model.embed_tokens(call.kwargs["input_ids"]).mean((0, 1)) for call in calls)
        network.run(calls[0])
        return ShiftState((total / len(calls)).detach(), len(calls))

    @contextmanager
    def on(self, network, state):
        hook = lambda module, args, result: result + self.strength * state.mean
        handle = network.module.model.embed_tokens.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
'''


def test_policies_are_measured_saved_and_put_on(source: Path, tmp_path: Path, plugin: Path) -> None:
    (plugin / "methods" / "shift.py").write_text(POLICY)
    recipe = {"name": "shifted", "steps": [{"rtn": {"scheme": "W8A16_G32"}}, {"shift": {"strength": 0.5}}]}
    result = compress(source, recipe, output=tmp_path / "out", samples=samples(source), measures=())
    (measured,) = result.policies
    assert isinstance(measured.step.method, RuntimePolicy)
    (read,) = policies.load(tmp_path / "out")
    assert read.step == measured.step
    assert read.state.calls == measured.state.calls == 1
    assert torch.equal(read.state.mean, measured.state.mean)
    plain = output(result.network.module, CALLS[0])
    with policies.on(result.network, [read]):
        shifted = output(result.network.module, CALLS[0])
    assert not torch.allclose(plain, shifted)
    assert torch.equal(output(result.network.module, CALLS[0]), plain)


def test_a_network_without_policies_has_none(source: Path) -> None:
    assert policies.load(source) == policies.load(None) == []


def test_only_folders_resume(source: Path, tmp_path: Path) -> None:
    for model, given in ((nn.Sequential, {}), (FAMILIES["llama"].build(), {"output": tmp_path / "out"}), (source, {})):
        with pytest.raises(AerogelError, match=r"only a model opened from a folder|cannot open a"):
            compress(model, RTN, resume=True, **given)


def test_given_calls_have_a_fingerprint() -> None:
    calls = [Call((torch.arange(4),), {"scale": torch.tensor([0.5], dtype=torch.bfloat16)})]
    network = open_model(FAMILIES["llama"].build())
    first = prepare(network, calls, 0, head=False).facts
    changed = [call.map(lambda tensor: tensor + 1) for call in calls]
    assert first["count"] == 1
    assert first == prepare(network, calls, 1, head=True).facts
    assert first != prepare(network, changed, 0, head=False).facts
