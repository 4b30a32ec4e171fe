"""Layers that change nothing leave first, and what is left is the model that one would assemble by hand, on disk and in a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.methods.structured.shortgpt import block_influence, cosines
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.crashing_runs import Doom, killed, options
from tests.engine.test_resume import outcome
from tests.folders import model_folder, text_file
from tests.tiny import FAMILIES, opened, output
from tests.tiny_text import SHAPE

MATRIX = {"options": {"count": 1, "protect_first": 0}}  # of two layers
DEPTH = 5
RECIPES = ("shortgpt-20",)


def llama(depth: int = DEPTH, idle: int | None = None) -> nn.Module:
    """A Llama of random layers; the idle one adds nothing to the stream."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": depth})).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0, 0.1)
        if idle is not None and name.startswith(f"model.layers.{idle}.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    return model.requires_grad_(False)


def assembled(model: nn.Module, staying: list[int]) -> nn.Module:
    """The same layers in a model that was built with so many."""
    made = llama(len(staying))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = tensor
            continue
        place, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(place) in staying:
            state[f"model.layers.{staying.index(int(place))}.{rest}"] = tensor
    made.load_state_dict(state)
    return made


def removed(model: nn.Module, calls: list[Call], folder: Path | None = None, **given: Any) -> aerogel.Result:
    return aerogel.compress(model, {"name": "s", "steps": [{"shortgpt": given}]}, samples=calls, output=folder, measures=())


def test_influence_is_the_literal_formula() -> None:
    """Tokens that pad a text do not count, whatever they are."""
    network, calls = opened("llama"), FAMILIES["llama"].calls(3)
    expected: dict[str, list[Tensor]] = {name: [] for name in network.blocks()}
    for call in calls:
        states = network.module(**call.kwargs, output_hidden_states=True).hidden_states
        block = network.module.get_submodule("model.layers.1")
        seen: list[Tensor] = []
        with torch.no_grad():  # the last of these states is behind the norm
            handle = block.register_forward_hook(lambda _, args, y, seen=seen: seen.append(y if isinstance(y, Tensor) else y[0]))
            network.module(**call.kwargs)
            handle.remove()
        for name, x, y in zip(expected, states, (states[1], seen[0]), strict=False):
            real = call.kwargs["attention_mask"].bool()
            expected[name] += [torch.cosine_similarity(a, b, dim=0) for a, b in zip(x[real], y[real], strict=True)]
    found = block_influence(network, list(expected), calls)
    assert found == pytest.approx({name: 1 - float(torch.stack(each).mean()) for name, each in expected.items()}, abs=1e-5)
    padded = [
        Call((), {**call.kwargs, "input_ids": torch.where(call.kwargs["attention_mask"] > 0, call.kwargs["input_ids"], 7)})
        for call in calls
    ]
    assert block_influence(network, list(expected), padded) == pytest.approx(found, abs=1e-6)
    assert any((call.kwargs["attention_mask"] == 0).any() for call in calls)


def test_a_token_without_a_direction_counts_half() -> None:
    assert cosines(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).tolist() == [0.5, -1.0]


@pytest.mark.parametrize("idle", [1, 3])
def test_a_layer_that_adds_nothing_leaves_first(idle: int, tmp_path: Path) -> None:
    """And what is left equals the model assembled by hand: its answers, its folder in transformers, its text with a cache."""
    calls = FAMILIES["llama"].calls(2)
    model = llama(idle=idle)
    before = [output(model, call) for call in calls]
    result = removed(model, calls, tmp_path / "out", count=1)
    notes = {line["name"]: line for line in result.journal}
    assert notes[f"model.layers.{idle}"]["influence"] == pytest.approx(0, abs=1e-5)
    assert [name for name, line in notes.items() if line["removed"]] == [f"model.layers.{idle}"]
    by_hand = assembled(llama(idle=idle), [place for place in range(DEPTH) if place != idle])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_hidden_layers == DEPTH - 1
    for call, was in zip(calls, before, strict=True):
        real = call.kwargs["attention_mask"].bool()
        expected = output(by_hand, call)
        assert torch.equal(output(result.network.module, call), expected)
        torch.testing.assert_close(output(theirs, call), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(expected[real], was[real], rtol=0, atol=1e-4)
    prompt = calls[0].kwargs["input_ids"][:1]
    texts = [one.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True) for one in (result.network.module, theirs, by_hand)]
    assert all(torch.equal(one, texts[-1]) for one in texts)
    slow = by_hand.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(texts[0], slow)


def test_the_least_influence_leaves_and_the_ends_stay() -> None:
    calls = FAMILIES["llama"].calls(2)
    network = aerogel.load(llama())
    influence = block_influence(network, list(network.blocks()), calls)
    result = removed(llama(), calls, share=0.4)
    gone = {line["name"] for line in result.journal if line["removed"]}
    assert gone == set(sorted([f"model.layers.{place}" for place in (1, 2, 3)], key=influence.__getitem__)[:2])
    assert [part.layer_idx for part in result.network.module.modules() if hasattr(part, "layer_idx")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "gpt_oss", "qwen2_5_vl"])
def test_settings_of_each_layer_go_with_it(name: str, tmp_path: Path) -> None:
    """Kinds of attention by layer, and a language model inside of another."""
    tiny = FAMILIES[name]
    model = tiny.build()
    before = model.config.get_text_config()
    lists = {key: list(value) for key, value in vars(before).items() if "layer" in key and isinstance(value, list) and len(value) == 2}
    result = removed(model, tiny.calls(2), tmp_path / "out", count=1, protect_first=0)
    assert [line["removed"] for line in result.journal if "removed" in line] == [True, False]
    again = aerogel.load(tmp_path / "out", lazy=False)
    config = again.config.get_text_config()
    assert config.num_hidden_layers == 1
    assert lists or name.startswith("qwen")
    assert all(list(getattr(config, key)) == value[1:] for key, value in lists.items())
    for call in tiny.calls(2):
        assert torch.equal(output(again.module, call), output(result.network.module, call))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortgpt")
    text_file(folder / "text.txt")
    return model_folder(folder / "model", num_hidden_layers=DEPTH)


AND_GPTQ = {"name": "tested", "steps": [{"shortgpt": {"share": 0.4}}, {"gptq": {"scheme": "W4A16_G32"}}]}
BEHIND_MAGNITUDE = {"name": "tested", "steps": [{"magnitude": {}}, {"shortgpt": {"count": 2}}, {"rtn": {"scheme": "W4A16_G32"}}]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [AND_GPTQ, BEHIND_MAGNITUDE])
def test_a_killed_run_resumes_with_the_same_bits(recipe: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """The layers that are left have other names than in the source; zeros go with them."""
    aerogel.compress(source, recipe, output=tmp_path / "whole", **options(source))
    killed(source, tmp_path / "out", recipe, Doom("save"))
    aerogel.compress(source, recipe, output=tmp_path / "out", resume=True, **options(source))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    network = aerogel.load(tmp_path / "out", lazy=False)
    assert list(network.blocks()) == [f"model.layers.{place}" for place in range(3)]


def test_the_plan_says_what_is_left_on_disk(source: Path, tmp_path: Path) -> None:
    planned = plan(source, AND_GPTQ, samples=options(source)["samples"], flops_a_second=lambda: 1e9)
    result = aerogel.compress(source, AND_GPTQ, output=tmp_path / "out", **options(source))
    assert not planned.problems
    assert planned.predicted_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "out/model.safetensors").values())
    assert len(planned.touched) == 3 * 7
    assert result.network.config.num_hidden_layers == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_recipe(recipe: str) -> None:
    result = aerogel.compress(llama(), recipe, samples=FAMILIES["llama"].calls(2), measures=())
    assert result.network.config.num_hidden_layers == 4


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"shortgpt": {"count": 4}}], "4 of 5 layers are to leave, and with the first 1 and the last 1 protected 3 may; remove fewer"),
    (
        [{"shortgpt": {}}, {"brecq": {"steps": 1}}],
        "brecq compares with the original model, and shortgpt before it removes layers; put brecq",
    ),
    (
        [{"kv_cache_fp8": {}}, {"shortgpt": {}}],
        "shortgpt comes after kv_cache_fp8, which was measured on all layers; put kv_cache_fp8 behind",
    ),
]


@pytest.mark.parametrize(("steps", "words"), REFUSED)
def test_what_cannot_go_well_is_refused(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        aerogel.compress(llama(), {"name": "s", "steps": steps}, samples=FAMILIES["llama"].calls(1), measures=())


def test_a_share_and_a_count_are_one_too_many() -> None:
    with pytest.raises(AerogelError, match="share and count both say how many layers leave"):
        removed(llama(), [], share=0.2, count=1)


def test_layers_that_only_their_number_tells_apart_are_refused() -> None:
    network: Network = aerogel.load(llama())
    network.module.get_submodule("model.layers.1.mlp").down_proj = nn.Linear(128, 64, bias=True)  # type: ignore[assignment]
    with pytest.raises(AerogelError, match=r"model\.layers\.1 has other weights than layers before it, and no list"):
        aerogel.compress(network, "shortgpt-20", samples=FAMILIES["llama"].calls(1), measures=())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_kv_shared_layers": 2}, "read keys and values of others"),
        ({"dense_layers": [0, 2]}, "dense_layers in the configuration names layers by their numbers"),
    ],
)
def test_settings_that_name_layers_by_number_are_refused(settings: dict[str, Any], words: str) -> None:
    network = aerogel.load(llama())
    network.config.update(settings)
    with pytest.raises(AerogelError, match=words):
        aerogel.compress(network, "shortgpt-20", samples=FAMILIES["llama"].calls(1), measures=())
