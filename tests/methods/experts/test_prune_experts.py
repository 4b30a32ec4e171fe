"""Experts that leave for good are the ones that the papers' formulas name; what stays routes among itself."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.experts.prune_experts import saliency
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.routing import experts_of, router_of
from aerogel.runtime.expert_skipping.seen import Arrived, arrivals, outputs_of_each
from tests.tiny import FAMILIES, opened, output

MIXTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "internvl"]


def test_saliency_by_hand() -> None:
    """Mean over an expert's tokens of its share times the norm of its output."""
    make = torch.Generator().manual_seed(0)
    y_ETH, share_TK = torch.randn(4, 6, 3, generator=make), torch.rand(6, 2, generator=make)
    index_TK = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1], [1, 0]])  # nobody goes to the last
    expected = []
    for expert in range(4):
        own = [(token, k) for token in range(6) for k in range(2) if index_TK[token, k] == expert]
        values = [float(share_TK[token, k] * y_ETH[expert, token].norm()) for token, k in own]
        expected.append(sum(values) / max(len(values), 1))
    assert saliency(y_ETH, Arrived(torch.zeros(6, 3), share_TK, index_TK)).tolist() == pytest.approx(expected)


def pruned(name: str, options: dict[str, Any], calls: list[Call], output: Path | None = None) -> Network:
    recipe = {"steps": [{"prune_experts": options}]}
    return aerogel.compress(FAMILIES[name].build(), recipe, samples=calls, output=output, measures=()).network


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("by", ["reap", "naee"])
def test_transformers_opens_what_is_left(name: str, by: str, tmp_path: Path) -> None:
    network = pruned(name, {"by": by, "ratio": 0.5}, FAMILIES[name].calls(3), tmp_path / "out")
    assert all(len(list(experts.children())) == 2 for experts in experts_of(network).values())
    auto = transformers.AutoModelForImageTextToText if network.family.modality == "image-text" else transformers.AutoModelForCausalLM
    call = FAMILIES[name].calls(1)[0]
    theirs = auto.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(output(theirs, call), output(network.module, call), rtol=0, atol=2e-5)


def test_naee_keeps_the_subset_whose_output_is_nearest() -> None:
    """By running each subset through the network itself, with routers that see the others as impossible."""
    calls = FAMILIES["mixtral"].calls(3)
    network = opened("mixtral")
    arrived = arrivals(network, calls, 2048)
    left = pruned("mixtral", {"by": "naee", "ratio": 0.25}, calls)
    for layer, (name, module) in enumerate(experts_of(network).items()):
        x_TH, router = arrived[layer].x_TH, router_of(network, name)
        dense = module(x_TH, *reversed(router(x_TH)[1:]))
        errors = {}
        for subset in combinations(range(4), 3):
            gone = [number for number in range(4) if number not in subset]
            logits = (x_TH @ router.weight.T).index_fill(1, torch.tensor(gone), -torch.inf)
            weight, index = logits.softmax(-1).topk(2)
            errors[subset] = float((module(x_TH, index, weight / weight.sum(-1, keepdim=True)) - dense).norm())
        best = min(errors, key=errors.__getitem__)
        kept = list(experts_of(left).values())[layer]
        for ours, number in zip(kept.children(), best, strict=True):
            assert torch.equal(ours.w1.weight, module[number].w1.weight)  # type: ignore[index, union-attr]


def test_reap_drops_the_least_salient() -> None:
    calls = FAMILIES["qwen3_moe"].calls(3)
    network = opened("qwen3_moe")
    left = pruned("qwen3_moe", {"ratio": 0.25}, calls)
    for layer, arrived in enumerate(arrivals(network, calls, 2048)):
        least = int(saliency(outputs_of_each(network, layer, arrived.x_TH), arrived).argmin())
        before, after = (list(experts_of(one).values())[layer] for one in (network, left))
        stayed = [expert.gate_proj.weight for number, expert in enumerate(before) if number != least]  # type: ignore[arg-type, union-attr]
        assert all(torch.equal(a, b.gate_proj.weight) for a, b in zip(stayed, after, strict=True))  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.75}, "leaves 1 of 4 experts, and tokens go to 2"),
        ({"ratio": 0.25, "by": "naee", "subsets": 3}, "4 subsets of 3 experts of 4 are more than 3"),
    ],
)
def test_too_much_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        pruned("mixtral", options, FAMILIES["mixtral"].calls(1))
