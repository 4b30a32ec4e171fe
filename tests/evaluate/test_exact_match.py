"""Replies are judged word for word, and what experts were spared is counted in both phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.data import chats
from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.engine.policies import CalibratedPolicy
from aerogel.errors import AerogelError
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.methods.experts.reduced_topk import ReducedTopk
from aerogel.recipe import Recipe
from tests.questions import untrained, written


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return open_model(untrained(), dtype=torch.float32)


def test_replies_that_are_the_expected_ones_count(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path, 10)
    asked = chats.drawn(chats.read(source), 6, 0)
    pad, tokenizer = network.processor.tokenizer.pad_token_id, network.processor.tokenizer
    said = ["No idea." if number % 3 else f" {chat.answer}" for number, chat in enumerate(asked)]

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        some, left = said[: len(input_ids)], said[len(input_ids) :]
        said[:] = left
        rows = [tokenizer(f"{one}<|im_end|>")["input_ids"] for one in some]
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [pad] * (width - len(row)) for row in rows])], dim=1)

    monkeypatch.setattr(network.module, "generate", generate)
    facts = ExactMatch(source=str(source), count=6, batch=4).measure(network)
    assert facts["right"] == pytest.approx(1 / 3)
    assert facts["count"] == 6
    assert "skipped" not in facts


def test_predictions_are_compared_and_skipping_is_counted(network: Any, tmp_path: Path) -> None:
    source = written(tmp_path, 5)
    measure = ExactMatch(source=str(source), count=5, new_tokens=3)
    same = measure.measure(network, network)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["top1"] == 1
    (call,) = chats.calls(chats.read(source), network.processor, 5, padded=True)
    (step,) = Recipe.parse({"steps": [{"reduced_topk": {"k": 1, "protect_special": False}}]}).steps
    assert isinstance(step.method, ReducedTopk)
    with policies.on(network, [CalibratedPolicy(step, step.method.calibrate(network, [call]))]):
        facts = measure.measure(network, network)
    skipped = facts["skipped"]
    assert skipped["prefill"] == skipped["decode"] == 0.75
    assert skipped["dropped_tokens"] == 0
    assert skipped["layers"] == [[0.75, 0.75]] * 6


def test_a_source_is_asked_for(network: Any) -> None:
    with pytest.raises(AerogelError, match=r"--set exact_match\.source=FILE\.jsonl"):
        ExactMatch().measure(network)


def test_a_dead_model_is_named(network: Any, tmp_path: Path) -> None:
    dead = open_model(untrained(), dtype=torch.float32)
    with torch.no_grad():
        next(dead.module.get_output_embeddings().parameters()).fill_(torch.nan)  # type: ignore[operator]
    measure = ExactMatch(source=str(written(tmp_path, 2)), count=2, new_tokens=1)
    message = f"exact_match: {type(dead.module).__name__} gives logits that are NaN"
    with pytest.raises(AerogelError, match=message):
        measure.measure(dead)
    with pytest.raises(AerogelError, match=message):
        measure._moved(network, dead, chats.read(measure.source))
