"""Whole MoE models under torch.compile while a rule is on: one graph, the same numbers, no other graph for other pairs; static caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, StaticCache

from aerogel.engine import policies
from aerogel.engine.policies import CalibratedPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.expert_skipping.routing import Routed, skipping
from aerogel.runtime.token_types import Vocabulary
from tests.runtime.expert_skipping.test_routing import everything, opened, skip
from tests.tiny import FAMILIES

RULES: dict[str, dict[str, Any]] = {
    "modes": {"ratio": 0.5, "points": 5},
    "single_threshold": {"ratio": 0.5},
    "reduced_topk": {"k": 1},
    "naee": {},
    "odp": {},
    "diep": {"tokens": 16},
}
LENGTH = 12


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def calls(count: int = 3) -> list[Call]:
    """Forwards of one shape and other words."""
    generator = torch.Generator().manual_seed(3)
    return [Call((), {"input_ids": torch.randint(3, 100, (2, LENGTH), generator=generator), "use_cache": False}) for _ in range(count)]


def calibrated(network: Network, name: str, rule: str) -> CalibratedPolicy:
    (step,) = Recipe.parse({"steps": [{rule: RULES[rule]}]}).steps
    return policies.calibrated(network, step, FAMILIES[name].calls(2, seed=9))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("qwen3_moe", "modes"),
        pytest.param("gpt_oss", "naee", marks=pytest.mark.slow),
        *(pytest.param("qwen3_moe", rule, marks=pytest.mark.slow) for rule in RULES if rule != "modes"),
        pytest.param("deepseek_v3", "modes", marks=pytest.mark.slow),
    ],
)
def test_one_graph_holds_for_all_that_is_dropped(name: str, rule: str) -> None:
    network = opened(name, unfuse_experts=False)
    measured, given = calibrated(network, name, rule), calls()
    with policies.on(network, [measured]):
        ratios, eager = [], []
        for call in given:
            with counting(network, Vocabulary.of(network)) as tally:
                eager.append(network.run(call).logits)
            ratios.append(tally.ratio())
        with torch.no_grad():
            compiled = torch.compile(network.module, fullgraph=True)
            first = compiled(**given[0].kwargs).logits
            graphs = counters["stats"]["unique_graphs"]
            others = [compiled(**call.kwargs).logits for call in given[1:]]
    assert min(ratios) > 0
    assert rule == "reduced_topk" or len(set(ratios)) > 1, "forwards that lose as many pairs would prove nothing"
    assert counters["stats"]["unique_graphs"] == graphs
    for ours, theirs in zip([first, *others], eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["modes", "odp"])
def test_tokens_are_written_with_a_static_cache(rule: str) -> None:
    network = opened("qwen3_moe", unfuse_experts=False)
    ids_BS = calls(1)[0].kwargs["input_ids"]

    def written(step: Callable[..., Any]) -> list[Tensor]:
        cache = StaticCache(config=network.config, max_cache_len=LENGTH + 8)
        found = [network.module(input_ids=ids_BS, past_key_values=cache).logits[:, -1]]
        for _ in range(4):
            found.append(step(input_ids=found[-1].argmax(-1)[:, None], past_key_values=cache).logits[:, -1])
        return found

    with torch.no_grad(), policies.on(network, [calibrated(network, "qwen3_moe", rule)]):
        eager = written(network.module)
        compiled = torch.compile(network.module, fullgraph=True)
        written(compiled)
        graphs = counters["stats"]["unique_graphs"]
        again = written(compiled)
    assert counters["stats"]["unique_graphs"] == graphs, "one graph for every token"
    for ours, theirs in zip(again, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("static", [False, True])
def test_attention_received_is_that_of_the_positions_read_now(static: bool) -> None:
    """A prompt in two pieces: keys of the first come before those of the second, a static cache's empty room behind both."""
    network = opened("qwen3_moe", unfuse_experts=False)
    ids_BS = calls(1)[0].kwargs["input_ids"]
    seen: list[Routed] = []

    def rule(routed: Routed) -> Tensor:
        seen.append(routed)
        return everything(routed)

    room = LENGTH + 8
    cache: Cache = StaticCache(config=network.config, max_cache_len=room) if static else DynamicCache(config=network.config)
    with torch.no_grad():
        with skipping(network, skip(network, rule), attention=True):
            for piece in (ids_BS[:, :5], ids_BS[:, 5:]):
                network.module(input_ids=piece, past_key_values=cache)
        network.module.set_attn_implementation("eager")
        probability_BHSS = network.module(input_ids=ids_BS, output_attentions=True).attentions[0]
    first, second = (one.received_BS for one in seen if one.layer == 0)
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, probability_BHSS[:, :, :5, :5].mean(1).sum(1))
    torch.testing.assert_close(second, probability_BHSS[:, :, 5:, 5:].mean(1).sum(1))


@pytest.mark.parametrize(("read", "own"), [(8, [5, 6, 7]), (30, [5, 6, 7]), (6, [3, 4, 5])], ids=["grown", "window", "room"])
def test_positions_read_now_are_the_last_that_are_there(read: int, own: list[int]) -> None:
    """Eight keys for three positions: all that were read, the last ones of a window, or six of them and empty room."""
    network = opened("qwen3_moe", unfuse_experts=False)
    made = skip(network, everything)
    made.kind_BS = torch.zeros(1, 3, dtype=torch.long)
    probability_BHSL = torch.rand(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    cache = SimpleNamespace(get_seq_length=lambda layer: read if layer == 4 else 0)
    made.attended(1, SimpleNamespace(layer_idx=4), (), {"past_key_values": cache}, (None, probability_BHSL))
    torch.testing.assert_close(made.received[1], probability_BHSL.mean(1).sum(1)[:, own])
