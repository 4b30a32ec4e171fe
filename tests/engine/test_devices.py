"""Runs on an accelerator, without one: the simulated device fails where an operand was not moved, and the numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine import policies
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import load, open_model
from aerogel.engine.progress import Event
from aerogel.engine.result import Result
from aerogel.engine.scores import measure, measure_models, time_models
from aerogel.engine.search.searching import search
from aerogel.evaluate.generation import Generation
from aerogel.evaluate.image_similarity import ImageSimilarity
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.perplexity import Perplexity
from aerogel.model.network import Network
from tests import simulated_device
from tests.clocks import Ticks
from tests.folders import model_folder, text_file
from tests.image_pipelines import classes, classifier
from tests.methods.matrix import METHODS, Case, answers, case
from tests.simulated_device import Watch
from tests.tiny import FAMILIES
from tests.words import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

COMMON = [
    ("gptq", "llama"), ("modes", "qwen3_moe"), ("attention_quant", "dit"), ("teacache", "dit"), ("visionzip", "llava"),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (("rotate", "llama"), ("rtn", "qwen2_5_vl"), ("gptq", "qwen3_moe"))),
]  # fmt: skip
"""A method of each kind that takes seconds; the slow tests take all."""
GPTQ: dict[str, Any] = {"steps": [{"gptq": {"scheme": "W4A16_G32"}}]}


@pytest.fixture
def watch() -> Iterator[Watch]:
    """An accelerator that torch reports."""
    with simulated_device.present() as found:
        yield found


@pytest.fixture(autouse=True)
def same_attention() -> Iterator[None]:
    """The CPU's fused attention adds in another order than what a backend in Python is given."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("devices")
    text_file(made / "text.txt", 20000)
    text_file(made / "other.txt", 4000, seed=1)
    return model_folder(made / "model")


def samples(folder: Path) -> Samples:
    return Samples(folder.parent / "text.txt", count=4, length=16)


def measures(folder: Path) -> list[Any]:
    read: dict[str, Any] = {"source": str(folder.parent / "other.txt"), "tokens": 100, "length": 64, "stride": 32}
    return [Perplexity(**read), KlDivergence(**read), Generation(prompts=("a b",), new_tokens=2)]


def given(tried: Case, result: Result) -> list[Tensor]:
    """What a result answers, with its policies on."""
    network = result.network
    with network.on_device(), policies.on(network, result.policies):
        return [answer.cpu() for answer in answers(network, tried.example.calls)]


def moved(network: Network) -> Network:
    """The network with all that belongs to it on the device, as a user moves it."""
    if hasattr(network.processor, "components"):
        network.processor.to(simulated_device.device())
    network.module.to(simulated_device.device())
    return network


def require_alike(method: str, family: str, there: bool) -> None:
    """Raise AssertionError unless a method does on the device what it does on the CPU."""
    tried = case(method, family)
    calls = tried.example.calls
    expected = given(tried, aerogel.compress(tried.example.copied(), tried.recipe, samples=calls, measures=()))
    with simulated_device.present():
        network = moved(tried.example.copied()) if there else tried.example.copied()
        result = aerogel.compress(network, tried.recipe, samples=calls, measures=(), device="auto" if there else simulated_device.NAME)
        found = given(tried, result)
        resting = {parameter.device.type for parameter in network.module.parameters()}
    assert resting == {simulated_device.NAME if there or tried.source == "pipeline" else "cpu"}
    for answer, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)  # NaN where tokens are dropped


@pytest.mark.parametrize(("method", "family"), COMMON)
def test_a_method_gives_the_numbers_of_the_cpu_where_blocks_are_brought(method: str, family: str) -> None:
    require_alike(method, family, there=False)


@pytest.mark.parametrize(("method", "family"), [("gptq", "llama"), ("fora", "dit")])
def test_and_where_the_whole_model_is_there(method: str, family: str) -> None:
    require_alike(method, family, there=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_vl_moe", "dit", "unet", "wan", "flux"])
def test_every_method_gives_the_numbers_of_the_cpu(method: str, family: str) -> None:
    if not case(method, family).problems:
        require_alike(method, family, there=True)


@pytest.mark.slow
def test_a_folder_with_its_teacher_gives_the_bits_of_the_cpu(folder: Path, tmp_path: Path, watch: Watch) -> None:
    recipe = {"steps": [{"brecq": {"scheme": "W8A16_G32", "targets": ["*_proj"], "steps": 2, "batch": 2}}]}
    made = [
        aerogel.compress(folder, recipe, samples=samples(folder), output=tmp_path / device, measures=(), device=device)
        for device in ("cpu", "auto")
    ]
    assert made[0].facts["checksums"] == made[1].facts["checksums"]


def test_a_folder_gives_the_bits_of_the_cpu(folder: Path, tmp_path: Path, watch: Watch) -> None:
    on_cpu = aerogel.compress(folder, GPTQ, samples=samples(folder), output=tmp_path / "cpu", measures=(), device="cpu")
    assert not watch.operations
    there = aerogel.compress(folder, GPTQ, samples=samples(folder), output=tmp_path / "there", measures=measures(folder))
    assert watch.operations["aten.mm.default"] > 0
    assert there.facts["provenance"]["machine"]["device"] == "simulated:0"
    assert {name: there.facts["checksums"][name] for name in on_cpu.facts["checksums"]} == on_cpu.facts["checksums"]
    assert there.network.device == simulated_device.device()
    again = measure_models(str(tmp_path / "there"), str(folder), measures(folder), device="cpu")
    for name, figure in (("perplexity", "nats_per_token"), ("kl_divergence", "kl"), ("generation", "same_share")):
        assert there.metrics["compressed"][name][figure] == pytest.approx(again["compressed"][name][figure], rel=1e-4, abs=1e-6)


def test_one_block_at_a_time_is_on_the_device(watch: Watch) -> None:
    """And what is around the blocks, as long as they are visited."""
    network = FAMILIES["llama"].build()
    layers = network.model.layers
    seen: list[list[str]] = []

    def tell(event: Event) -> None:
        if event.stage == "compress":
            seen.append([part.self_attn.o_proj.weight.device.type for part in layers] + [network.model.embed_tokens.weight.device.type])

    recipe = {"steps": [{"smoothquant": {}}]}
    aerogel.compress(network, recipe, samples=FAMILIES["llama"].calls(2), measures=(), device="auto", tell=tell)
    assert not watch.operations, "a live module stays where it is"
    aerogel.compress(network, recipe, samples=FAMILIES["llama"].calls(2), measures=(), device="simulated", tell=tell)
    there, here = simulated_device.NAME, "cpu"
    assert [there, here, there] in seen
    assert [here, there, there] in seen
    assert all(places[:2].count(there) <= 1 for places in seen)
    assert {parameter.device.type for parameter in network.parameters()} == {here}


def test_outputs_of_blocks_come_back_once_for_each_call(watch: Watch) -> None:
    network, calls = FAMILIES["llama"].build(), FAMILIES["llama"].calls(2)
    aerogel.compress(network, GPTQ, samples=calls, measures=(), device="simulated")
    for call in calls:
        shape = torch.Size((*call.kwargs["input_ids"].shape, 64))
        assert watch.moved_out[shape] == 2, "one for each block"
        assert watch.moved_in[shape] <= 4 * 2


@pytest.mark.slow
def test_a_run_on_the_device_is_resumed_with_the_same_bits(folder: Path, tmp_path: Path, watch: Watch) -> None:
    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if event.stage == "compress" and event.done == 1:
            raise Killed

    options: dict[str, Any] = {"samples": samples(folder), "measures": ()}
    whole = aerogel.compress(folder, GPTQ, output=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        aerogel.compress(folder, GPTQ, output=tmp_path / "out", tell=kill, **options)
    with pytest.raises(aerogel.AerogelError, match=r"was started with another device \(\"simulated\", now \"cpu\"\)"):
        aerogel.compress(folder, GPTQ, output=tmp_path / "out", resume=True, device="cpu", **options)
    resumed = aerogel.compress(folder, GPTQ, output=tmp_path / "out", resume=True, **options)
    assert resumed.facts["checksums"] == whole.facts["checksums"]


def test_a_pipeline_is_recorded_compressed_and_measured_there(tmp_path: Path, watch: Watch) -> None:
    pipeline = classes()
    pipeline.save_pretrained(tmp_path / "dit")
    judge = ImageSimilarity(features=str(classifier(tmp_path / "judge")), count=2, steps=3, batch=2)
    wanted = Denoising(count=2, steps=3, batch=2)
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}, {"fora": {}}]}
    made = {
        device: aerogel.compress(tmp_path / "dit", recipe, samples=wanted, output=tmp_path / device, measures=[judge], device=device)
        for device in ("cpu", "simulated")
    }
    figures = {device: result.metrics["compressed"]["image_similarity"] for device, result in made.items()}
    assert figures["simulated"]["mse"] == pytest.approx(figures["cpu"]["mse"], rel=1e-2)
    assert watch.operations["aten.convolution.default"] > 0
    facts = time_models(str(tmp_path / "simulated"), str(tmp_path / "dit"), {"steps": 3, "rounds": 1})
    assert facts["compressed"]["sampling"]["device"] == "simulated:0"


def test_a_live_module_is_measured_there_and_comes_back(folder: Path, watch: Watch) -> None:
    network = open_model((FAMILIES["llama"].build(), tokenizer()), device="simulated")
    found = measure(network, None, measures(folder)[:1])
    assert watch.operations["aten.mm.default"] > 0
    assert {parameter.device.type for parameter in network.module.parameters()} == {"cpu"}
    here = measure(open_model((FAMILIES["llama"].build(), tokenizer())), None, measures(folder)[:1])
    assert found["original"]["perplexity"]["perplexity"] == pytest.approx(here["original"]["perplexity"]["perplexity"], rel=1e-4)


def test_text_is_generated_and_timed_there(folder: Path, tmp_path: Path, watch: Watch) -> None:
    aerogel.compress(folder, GPTQ, samples=samples(folder), output=tmp_path / "out", measures=())
    facts = time_models(str(tmp_path / "out"), str(folder), {"prompt": 8, "new_tokens": 4, "rounds": 1})
    assert {side["speed"]["device"] for side in facts.values()} == {"simulated:0"}
    assert facts["original"]["speed"]["path"] == "fast_decoder"


@pytest.mark.slow
def test_caches_and_rules_are_searched_there(tmp_path: Path, watch: Watch) -> None:
    network = open_model(classes(), device="auto")
    assert network.device.type == "cpu"
    network = open_model(classes(), device="simulated")
    wanted = Denoising(count=1, steps=3, batch=1)
    found = search(network, "cache", 1.2, only=("fora",), samples=wanted, rounds=1, clock=Ticks(network))
    assert found.facts["rows"]
    text_file(tmp_path / "text.txt", 20000)
    moe = model_folder(tmp_path / "moe", "qwen3_moe")
    read = Samples(tmp_path / "text.txt", count=4, length=16)
    clock = iter(range(10**6))
    skips = search(moe, "skip", 0.3, only=("single_threshold",), samples=read, rounds=1, clock=lambda: float(next(clock)))
    assert skips.facts["rows"][0]["policy"] == "single_threshold"
    assert skips.facts["provenance"]["machine"]["device"] == "simulated:0"


def test_a_saved_policy_acts_there(tmp_path: Path, watch: Watch) -> None:
    tried = case("modes", "qwen3_moe")
    aerogel.compress(tried.example.copied(), tried.recipe, samples=tried.example.calls, output=tmp_path / "out", measures=())
    here, there = (load(tmp_path / "out", lazy=False, device=device) for device in ("cpu", "auto"))
    for wanted, found in zip(answers(here, tried.example.calls), answers(there, tried.example.calls), strict=True):
        assert found.device == simulated_device.device()
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)
