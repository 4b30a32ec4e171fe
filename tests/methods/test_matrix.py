"""Every method on every family: what the plan refuses is refused before any work, and what it does not refuse keeps what it declares.

A new method needs no line here unless its defaults do not fit networks of width 64: see `OPTIONS` in matrix.py, or MATRIX in its own test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import aerogel
from aerogel import catalog
from aerogel.engine import policies
from aerogel.engine.exporting import source_of
from aerogel.engine.result import Result
from aerogel.errors import AerogelError
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import Requirement, RuntimePolicy, WeightMethod
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.methods.matrix import GIVEN, LACKING, METHODS, Case, answers, case, first_alike, lacking, made, reachable, require_close, step
from tests.tiny import FAMILIES, opened

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' samplers

WEIGHTS = [name for name in METHODS if issubclass(catalog.find("methods", name), WeightMethod)]


# Family by family: the two processes of a run each build about half of them.
@pytest.mark.parametrize(("method", "name"), [(method, name) for name in sorted(FAMILIES) for method in METHODS])
def test_method_on_family(method: str, name: str, tmp_path: Path) -> None:
    tried = case(method, name)
    if not tried.problems:
        require_kept(tried, tmp_path)
    elif first_alike(method) == method or not lacking(tried):
        require_refused(tried, tmp_path)
    else:  # refused for what it requires, as the first method that requires the same is, which was refused before any work
        assert case(first_alike(method), name).problems


def require_refused(tried: Case, folder: Path) -> None:
    """Raise AssertionError unless what the plan says is said before any forward, and nothing is changed or written."""
    example = tried.example
    forward = example.network.module.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    try:
        with pytest.raises(AerogelError) as refusal:
            aerogel.compress(example.network, tried.recipe, samples=example.calls, output=folder / "out", measures=())
    finally:
        forward.remove()
    assert tried.problems[0] in str(refusal.value)
    assert not list(folder.iterdir())
    for answer, before in zip(answers(example.network, example.calls), example.expected, strict=True):
        assert torch.equal(answer, before)


def require_kept(tried: Case, folder: Path) -> None:
    """Raise AssertionError unless a method reaches what it says, keeps the output close, and is saved as it is in memory."""
    example, network = tried.example, tried.example.copied()
    network.module.requires_grad_(True)  # as from_pretrained leaves it
    result = aerogel.compress(network, tried.recipe, samples=example.calls, output=folder / "out", measures=())
    schemes = {name: str(scheme) for name, scheme in tried.before[-1].quantized.items()}
    assert reached(network) == schemes
    if any(isinstance(step.method, WeightMethod) for step in tried.steps):
        assert schemes.keys() == reachable(tried)
    given = under_policies(tried, result)
    for answer, expected, bound in zip(given, example.expected, tried.bounds, strict=True):
        there = ~answer.isnan().all(-1) if any(one.policy.drops_positions for one in result.policies) else slice(None)
        if tried.removes_blocks:
            assert answer.isfinite().all()
            assert answer.shape == expected.shape
        else:
            require_close(answer[there], expected[there], bound)
    again = reopened(folder / "out", tried.answered)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(given, again, strict=True))


def under_policies(tried: Case, result: Result) -> list[Tensor]:
    """The answers with the policies on; raises AssertionError unless they change some, and nothing once they are taken off."""
    network, calls = result.network, tried.answered
    assert bool(result.policies) == any(isinstance(step.method, RuntimePolicy) for step in tried.steps)
    if not result.policies:
        return answers(network, calls)
    without = answers(network, calls)
    with policies.on(network, result.policies):
        given = answers(network, calls)
    for before, after, expected in zip(without, answers(network, calls), tried.example.expected, strict=True):
        assert torch.equal(before, expected)
        assert torch.equal(after, expected)
    # What quantizes a cache and leaves the prompt as it is changes later calls only: tests/methods/kv_cache decode.
    assert not all(map(torch.equal, given, without)) or all(getattr(one.policy, "exact_prompt", False) for one in result.policies)
    return given


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_refused_where_the_network_lacks_what_it_requires(method: str) -> None:
    """And nowhere else, but for reasons of its own, which are not those of most."""
    cases = [case(method, name) for name in sorted(FAMILIES)]
    refused, lack = {one.family for one in cases if one.problems}, {one.family for one in cases if lacking(one)}
    assert lack <= refused
    others = [one for one in cases if one.family not in lack]
    assert 2 * len(refused - lack) < len(others)
    for one in others:
        assert [why for why in one.problems if not why.endswith(tuple(one.own_problems))] == []


@pytest.mark.parametrize("method", [name for name in METHODS if "calls" in made(name).requires])
def test_an_activation_that_is_not_finite_is_named(method: str, tmp_path: Path) -> None:
    """One layer gives infinite numbers from finite weights: every method that reads activations names a layer and the number."""
    tried = next(one for one in (case(method, name) for name in ("llama", "mixtral", "unet", "dit", "llava")) if not one.problems)
    network = tried.example.copied()
    parts = {name: part for name, part in network.module.named_modules() if isinstance(part, torch.nn.Linear)}
    inside = tuple(f"{block}." for block in network.blocks())
    large = next(part for name, part in reversed(parts.items()) if name.startswith(inside) and name not in network.gates)
    with torch.no_grad():
        large.weight.fill_(3e38)
    with pytest.raises(AerogelError, match=r"^\S+: its \w+ (is|are) not finite \(largest magnitude (inf|nan)\); check the weights") as said:
        aerogel.compress(network, tried.recipe, samples=tried.example.calls, output=tmp_path / "out", measures=())
    assert str(said.value).partition(":")[0] in parts
    assert not (tmp_path / "out").exists()


def reopened(folder: Path, calls: Sequence[Call]) -> list[Tensor]:
    """What a saved network answers."""
    index = folder / "model_index.json"
    if not index.exists() or [None, None] not in json.loads(index.read_text("utf-8")).values():
        return answers(aerogel.load(folder, lazy=False), calls)
    # diffusers opens no pipeline that has no text encoder: then the denoiser alone.
    network = aerogel.load(folder / "transformer", lazy=False)
    with policies.on(network, policies.load(folder)):
        return answers(network, calls)


def test_every_requirement_has_its_lack() -> None:
    assert LACKING.keys() | GIVEN == set(get_args(Requirement))
    assert not LACKING.keys() & GIVEN


@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like, lambda x: x.flip(-1), lambda x: 2 * x, lambda x: x / 0])
@pytest.mark.parametrize("name", ["llama", "mixtral", "dit"])
def test_what_is_not_the_answer_is_not_close(name: str, make: Any) -> None:
    for one in (one for one in (case(method, name) for method in METHODS) if not one.problems):
        for expected, bound in zip(one.example.expected, one.bounds, strict=True):
            require_close(expected, expected, bound)
            with pytest.raises(AssertionError):
                require_close(make(expected), expected, bound)


@pytest.mark.parametrize("method", [name for name in WEIGHTS if "calls" in catalog.find("methods", name)().requires])
def test_experts_that_no_token_reached_are_quantized_and_reported(method: str, tmp_path: Path) -> None:
    """One token goes to two of four experts; the other two are rounded to nearest, and the journal says so."""
    call = Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})
    network = FAMILIES["qwen3_moe"].build()
    with pytest.warns(UserWarning, match="no token reached it"):
        result = aerogel.compress(network, alone(method), samples=[call], output=tmp_path / "out", measures=())
    assert reached(result.network).keys() == reachable(case(method, "qwen3_moe"))
    experts = [entry for entry in result.journal if ".experts." in entry["name"]]
    assert len(experts) == 2 * 4 * 3
    assert sum("no token" in str(entry.get("fallback")) for entry in experts) == 2 * 2 * 3
    assert all(torch.isfinite(torch.tensor(entry["error"])) for entry in experts)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folder_gives_the_bits_of_a_live_network(name: str, tmp_path: Path) -> None:
    """A folder is compressed with few blocks in memory; names of tensors that stay are those the folder has."""
    tiny = FAMILIES[name]
    tiny.build().save_pretrained(tmp_path / "source")
    for source, target in ((tiny.build(), "live"), (tmp_path / "source", "lazy")):
        aerogel.compress(source, alone("gptq"), samples=tiny.calls(2), output=tmp_path / target, measures=())
    live, lazy = stored(tmp_path / "live"), stored(tmp_path / "lazy")
    assert live.keys() == lazy.keys()
    assert all(torch.equal(live[key], tensor) for key, tensor in lazy.items())
    before = stored(tmp_path / "source")
    if any(
        part.names.fused_on_disk for part in opened(name).module.modules() if isinstance(part, ExpertList)
    ):  # codes have no fused form: quantized experts lie one by one
        before = {key: tensor for key, tensor in before.items() if ".experts." not in key}
        lazy = {key: tensor for key, tensor in lazy.items() if ".experts." not in key}
    assert {key.removesuffix("_packed").removesuffix("_scale").removesuffix("_shape") for key in lazy} == before.keys()


@pytest.mark.parametrize("name", ["dit", "wan", "unet"])
def test_formats_of_language_engines_refuse_denoisers(name: str, tmp_path: Path) -> None:
    aerogel.compress(FAMILIES[name].build(), alone("rtn"), samples=FAMILIES[name].calls(1), output=tmp_path / "out", measures=())
    for_denoisers = {"compressed_tensors", "bitmask", "modelopt", "onnx", "cache_policy", "cache_dit"}
    formats = set(catalog.names("exporters")) - for_denoisers
    assert formats
    for exporter in formats:
        (reason,) = catalog.find("exporters", exporter)().refuse(source_of(tmp_path / "out"))
        assert "language models" in reason, exporter


def stored(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def alone(method: str) -> dict[str, Any]:
    return {"name": f"{method}-alone", "steps": [step(method)]}


def reached(network: Network) -> dict[str, str]:
    """The schemes of the quantized layers, by full name."""
    parts = network.module.named_modules()
    return {name.removesuffix(".inner"): str(part.scheme) for name, part in parts if isinstance(part, QuantLinear)}
