"""On an accelerator: compressing, evaluating, generating, caching and skipping give what they give on the CPU. Skipped where none is."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.engine import policies
from aerogel.engine.calibration import Samples
from aerogel.engine.in_parts import in_parts
from aerogel.engine.opening import load, open_model
from aerogel.engine.scores import measure_models, time_models
from aerogel.evaluate.generation import Generation
from aerogel.evaluate.image_similarity import ImageSimilarity
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.perplexity import Perplexity
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.model.calls import Call
from aerogel.runtime.kv_cache.offloading import Event, Offloading
from aerogel.runtime.tokens.decoder import decoder_of
from tests.folders import model_folder, text_file
from tests.image_pipelines import classes, classifier
from tests.methods.matrix import METHODS, answers, case
from tests.methods.prompt_tokens.prompts import deep, prompt
from tests.tiny import FAMILIES, output

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' samplers
]

CLOSE = 5e-3
"""Relative error of an answer: of the order of sums, and of TF32 where torch allows it."""
TURNED = 0.05
"""Where a rounding or the order of two scales turned."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu")
    text_file(made / "text.txt", 20000)
    text_file(made / "other.txt", 4000, seed=1)
    return model_folder(made / "model", num_hidden_layers=3)


def samples(folder: Path) -> Samples:
    return Samples(folder.parent / "text.txt", count=8, length=24)


def accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None, "the tests of this file are skipped without one"
    return found


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_network_answers_the_same(name: str) -> None:
    call = FAMILIES[name].calls(1)[0]
    expected = output(FAMILIES[name].build(), call)
    network = load(FAMILIES[name].build(), device=accelerator(), unfuse_experts=False)
    with network.on_device():
        found = network.run(call)
    answer = (found.logits if hasattr(found, "logits") else found.sample).cpu()
    assert float((answer - expected).norm() / expected.norm()) < CLOSE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_vl_moe", "dit", "unet", "wan", "flux"])
@pytest.mark.parametrize("there", [False, True], ids=["brought", "there"])
def test_a_method_gives_what_it_gives_on_the_cpu(method: str, family: str, there: bool) -> None:
    tried = case(method, family)
    if tried.problems:
        pytest.skip(tried.problems[0])
    calls = tried.example.calls
    expected = aerogel.compress(tried.example.copied(), tried.recipe, samples=calls, measures=())
    network = tried.example.copied()
    if there:
        if hasattr(network.processor, "components"):
            network.processor.to(accelerator())
        network.module.to(accelerator())
    result = aerogel.compress(network, tried.recipe, samples=calls, measures=(), device=accelerator())
    with policies.on(expected.network, expected.policies):
        wanted = answers(expected.network, calls)
    with network.on_device(), policies.on(network, result.policies):
        found = answers(network, calls)
    for one, other in zip(found, wanted, strict=True):
        assert one.device.type == accelerator().type
        assert float((one.cpu() - other).norm() / other.norm()) < TURNED


@pytest.mark.parametrize("step", [{"gptq": {"scheme": "W4A16_G32"}}, {"awq": {"scheme": "W4A16_G32"}}, {"rtn": {"scheme": "W8A8"}}])
def test_a_folder_is_compressed_and_measured(folder: Path, tmp_path: Path, step: dict[str, Any]) -> None:
    read: dict[str, Any] = {"source": str(folder.parent / "other.txt"), "tokens": 300, "length": 64, "stride": 32}
    measures = [Perplexity(**read), KlDivergence(**read), Generation(prompts=("a b",), new_tokens=4)]
    made = {
        device: aerogel.compress(
            folder, {"steps": [step]}, samples=samples(folder), output=tmp_path / device, measures=measures, device=device
        ).metrics["compressed"]
        for device in ("cpu", "auto")
    }
    again = measure_models(str(tmp_path / "auto"), str(folder), measures, device="cpu")["compressed"]
    for found in (made["cpu"], again):
        assert made["auto"]["perplexity"]["nats_per_token"] == pytest.approx(found["perplexity"]["nats_per_token"], rel=TURNED)
        assert made["auto"]["kl_divergence"]["kl"] == pytest.approx(found["kl_divergence"]["kl"], rel=0.2, abs=1e-4)
    facts = time_models(str(tmp_path / "auto"), str(folder), {"prompt": 8, "new_tokens": 4, "rounds": 2})
    assert facts["compressed"]["speed"]["device"].startswith(accelerator().type)
    assert facts["compressed"]["speed"]["peak_memory_bytes"] > 0


def test_a_pipeline_is_recorded_cached_and_measured(folder: Path, tmp_path: Path) -> None:
    classes().save_pretrained(tmp_path / "dit")
    judge = ImageSimilarity(features=str(classifier(tmp_path / "judge")), count=2, steps=3, batch=2)
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}, {"fora": {}}]}
    wanted = Denoising(count=2, steps=3, batch=2)
    made = {
        device: aerogel.compress(tmp_path / "dit", recipe, samples=wanted, output=tmp_path / device, measures=[judge], device=device)
        for device in ("cpu", "auto")
    }
    psnr = {device: result.metrics["compressed"]["image_similarity"]["psnr"] for device, result in made.items()}
    assert psnr["auto"] == pytest.approx(psnr["cpu"], abs=3)


@pytest.mark.parametrize("there", [False, True])
def test_a_denoiser_in_parts_answers_the_same(there: bool) -> None:
    network = open_model(classes().to(accelerator()) if there else classes(), device=accelerator())
    call = record(classes(), classes().transformer, Denoising(count=2, steps=2, batch=2))[0]
    with network.on_device():
        expected = network.run(call)[0]
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            with in_parts(network, call):
                assert {type(parameter) for parameter in network.module.parameters()} == {DTensor}
                torch.testing.assert_close(network.run(call)[0], expected)
        with network.on_device():
            torch.testing.assert_close(network.run(call)[0], expected)
    finally:
        torch.distributed.destroy_process_group()


def test_calls_are_halved_until_they_fit(folder: Path) -> None:
    """With a limit on torch's allocator that one call of all sequences does not fit into, and one of few does."""
    if accelerator().type != "cuda":
        pytest.skip("only CUDA's allocator takes a limit")
    vocabulary, sequences, length = 128, 4096, 128
    network = load(FAMILIES["llama"].build(), device="cuda")
    ids = torch.randint(3, 112, (sequences, length), generator=torch.Generator().manual_seed(0))
    # No call waits inside a block: that would be memory that halves do not save.
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_G32", "max_activation_gb": 0}}]}
    total = torch.cuda.get_device_properties(0).total_memory
    one_call = sequences * length * vocabulary * 4
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 2 * one_call) / total))
        calls = [Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})]
        with pytest.warns(UserWarning, match="had too little memory"):
            aerogel.compress(network, recipe, samples=calls, measures=())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_cache_in_host_memory_gives_the_bits_of_one_on_the_device(pruned: bool) -> None:
    """Copies run beside the computation; the cache ends in pinned memory, and the device never holds more than two layers of it."""
    network = load(deep().module, device=str(accelerator()))
    policy, events = PromptPruning(keep=(0.5,), layers=(3,), min_length=64, block=8, sub_block=4), list[Event]()
    call = Call((), {key: value.to(accelerator()) for key, value in prompt(2).kwargs.items() if key != "use_cache"})
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with policy.on(network, policy.calibrate(network, [call])) if pruned else nullcontext():
        resident: Any = network.module.generate(**call.kwargs, **options)  # type: ignore[operator]
        for _ in range(5):
            with Offloading(network, decoder_of(network), log=events.append).on():
                ours: Any = network.module.generate(**call.kwargs, **options)  # type: ignore[operator]
            assert torch.equal(ours.sequences, resident.sequences)
    layers = list(zip(ours.past_key_values.layers, resident.past_key_values.layers, strict=True))
    assert all(one.keys.is_pinned() and torch.equal(one.keys, other.keys.cpu()) for one, other in layers)
    assert all(torch.equal(one.values, other.values.cpu()) for one, other in layers)
    assert max(event.held for event in events) <= 2 * max(other.keys.nbytes + other.values.nbytes for _, other in layers)
