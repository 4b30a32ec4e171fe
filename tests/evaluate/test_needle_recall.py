"""Recall of hidden numbers: which replies count, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.data import needles
from aerogel.errors import AerogelError
from aerogel.evaluate import needle_recall
from aerogel.evaluate.needle_recall import NeedleRecall
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests.data.test_needles import bytewise
from tests.methods.prompt_tokens.prompts import deep
from tests.tiny import FAMILIES
from tests.words import WORDS, tokenizer


def test_replies_with_the_number_count_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that finds what lies in the second half, and says another number otherwise."""
    network = deep()
    network.processor = bytewise()
    network.module.config.vocab_size, network.module.config.max_position_embeddings = 256, 2000  # type: ignore[union-attr]
    options = {"length": 1000, "depths": (0.0, 0.75, 1.0), "count": 2, "batch": 3}
    prompts = iter(needles.prompts(network.processor, 1000, (0.0, 0.75, 1.0), 2))

    def reply(_: Any, inputs: Any, new_tokens: int, measure: str) -> torch.Tensor:
        assert inputs["input_ids"].shape == (3, 1000)
        assert (new_tokens, measure) == (12, "needle_recall")
        said = [f" {one.answer}.." if one.depth > 0.5 else " 0000000.." for one in (next(prompts) for _ in range(3))]
        return torch.tensor([network.processor(one)["input_ids"] for one in said])

    monkeypatch.setattr(needle_recall, "continued", reply)
    found = NeedleRecall(**options).measure(network)  # type: ignore[arg-type]
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["recall_by_depth"] == [0, 1, 1]
    assert [wrong for _, wrong in found["wrong"]] == ["0000000.."] * 2
    assert (found["count"], found["length"], found["keys"], found["source"]) == (6, 1000, 1, "moby-dick")


def test_a_model_that_knows_no_number_recalls_none(tmp_path: Path) -> None:
    """By its own generation; the words of the needle are unknown to its tokenizer."""
    book = tmp_path / "book.txt"
    book.write_text(". ".join(" ".join(WORDS) for _ in range(20)))
    network = Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer(chat=True))
    found = NeedleRecall(length=110, depths=(0.0, 1.0), count=1, source=str(book)).measure(network)
    assert found["recall"] == 0
    assert found["recall_by_depth"] == [0, 0]


def test_prompts_beyond_the_positions_are_refused() -> None:
    network = Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer())
    with pytest.raises(
        AerogelError, match=r"^needle_recall: a prompt of 2048 tokens and its answer do not fit the 128 positions of this model$"
    ):
        NeedleRecall().measure(network)
