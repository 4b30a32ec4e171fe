"""Needle prompts as data: by name and in Python, for a search that judges rules by the numbers that are found, and for measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.data.chats import IGNORED
from aerogel.data.needles import Needles
from aerogel.engine.calibration import CalibrationRequest, prepare, with_batch_size
from aerogel.engine.search import judging_answers
from aerogel.engine.search.searching import search
from aerogel.errors import AerogelError
from aerogel.evaluate.needle_recall import NeedleRecall
from aerogel.methods.prompt_tokens.random_blocks import RandomBlocks
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests.methods.prompt_tokens.prompts import deep
from tests.words import WORDS, tokenizer

RULES = sorted(
    name for name in catalog.names("methods") if catalog.find("methods", name).__module__.startswith("aerogel.methods.prompt_tokens.")
)
SMALL = {"min_length": 160, "block": 4, "sub_block": 2, "q_window": 4, "sink": 2, "local": 8, "first": 4, "window": 4, "kernel": 3}


def network() -> Network:
    found = deep()
    found.processor = tokenizer()
    return found


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(". ".join(" ".join(WORDS[number % 7 :]) for number in range(60)))
    return str(path)


def small(rules: list[str]) -> list[str]:
    fields = {rule: catalog.find("methods", rule).__dataclass_fields__ for rule in rules}
    return [f"{rule}.{option}={value}" for rule in rules for option, value in SMALL.items() if option in fields[rule]]


def test_every_rule_for_long_prompts_is_judged_on_needles(book: str, tmp_path: Path) -> None:
    """Each of the folder, by the answer behind prompts that have exactly the length that its rule acts from."""
    wanted = Needles(keys=2, count=2, length=160, source=book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        found = search(network(), "tokens", "85%", samples=wanted, only=RULES, overrides=small(RULES), output=tmp_path / "out", rounds=1)
    facts = found.facts
    assert facts["left_out"] == []
    assert sorted(row["policy"] for row in facts["rows"]) == RULES
    assert (facts["prompt"], facts["count"], facts["needles"], facts["chats"]) == (160, 2, True, False)
    assert facts["answer_tokens"] == 2  # a number is one unknown word here
    assert all(row["kl"] > 0 and row["right"] == 0 for row in facts["rows"])
    assert facts["provenance"]["calibration"]["source"] == "needles:2"
    assert "2 prompts with hidden numbers held out of calibration" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_rule_that_finds_most_is_the_best(book: str) -> None:
    rules, shares = ["random_blocks", "recent_blocks"], iter([1.0, 0.25, 0.75])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        patch.setattr(NeedleRecall, "right", lambda *_: next(shares))
        wanted = Needles(count=2, length=160, source=book)
        found = search(network(), "tokens", "85%", samples=wanted, only=rules, overrides=small(rules), rounds=1)
    assert found.facts["right"] == 1
    assert [row["right"] for row in found.facts["rows"]] == [0.25, 0.75]
    assert found.best is not None
    assert found.best.step.name == "recent_blocks"
    row: dict[str, Any] = {"right": 0.5, "kl": 0.1}
    assert judging_answers.rank(row, True) < judging_answers.rank({"right": 0.5, "kl": 0.2}, True)
    assert judging_answers.rank(row, True) < judging_answers.rank({"right": 0.4, "kl": 0.0}, True)
    assert judging_answers.rank(row, False) > judging_answers.rank({"right": None, "kl": 0.0}, False)


def test_calibration_reads_the_answer_behind_each_prompt(book: str) -> None:
    wanted = Needles(count=7, length=160, source=book)
    found = prepare(network(), with_batch_size(wanted, 3), 0, head=False)
    assert [len(call.kwargs["input_ids"]) for call in found.calls] == [3, 3, 1]
    for call in found.calls:
        ids_BL, labels_BL = call.kwargs["input_ids"], call.kwargs["labels"]
        assert ids_BL.shape[1] == 161
        assert bool((labels_BL[:, :160] == IGNORED).all())
        assert torch.equal(labels_BL[:, 160:], ids_BL[:, 160:])
    (why,) = RandomBlocks(min_length=161).unsuitable(network(), found.calls)  # the answer is no part of a prompt
    assert why.startswith("the longest prompt of the calibration data has 160 tokens, and prompts are pruned from 161 on")
    assert found.facts["source"] == "needles:1"
    assert (found.facts["count"], found.facts["length"]) == (7, 160)
    again = prepare(network(), wanted, 0, head=False)
    assert again.facts["fingerprint"] == found.facts["fingerprint"] != prepare(network(), wanted, 1, head=False).facts["fingerprint"]


def test_weights_and_policies_are_calibrated_on_needles() -> None:
    options = {option: SMALL[option] for option in ("min_length", "block", "sink", "local")}
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_G16"}}, {"random_blocks": options}]}
    result = aerogel.compress(network(), recipe, samples=CalibrationRequest("needles:2", count=2, length=160), measures=())
    state = result.policies[-1].state
    assert state.answer_tokens == 2
    assert 0 < state.kept < 1
    assert state.kl > 0


def test_a_name_says_how_many_numbers_are_hidden() -> None:
    assert CalibrationRequest("needles").shown(network()) == Needles(length=480)
    assert CalibrationRequest("needles:4", count=3, length=200).shown(network()) == Needles(4, 3, 200)
    for name in ("needles:0", "needles:", "needles:many", "needles:197"):
        with pytest.raises(AerogelError, match="does not say how many numbers are hidden: give needles, or needles:1 to needles:196"):
            CalibrationRequest(name).shown(network())


def test_what_needles_do_not_fit_is_said() -> None:
    with pytest.raises(AerogelError, match=r"^needles:1: a prompt of 510 tokens and its answer do not fit the 512 positions of this"):
        prepare(network(), Needles(length=510), 0, head=False)
    with pytest.raises(AerogelError, match=r"^nothing of the prompt is left for text; ask for \d+ more tokens at least$"):
        prepare(network(), Needles(length=20), 0, head=False)
    with pytest.raises(AerogelError, match=r"model has no tokenizer for needles:1; load it from a folder with one$"):
        prepare(deep(), Needles(length=160), 0, head=False)
    with pytest.raises(AerogelError, match=r"^column is 'text', and needles are prompts that are made here; remove it$"):
        CalibrationRequest("needles", column="text").shown(network())
    painter = Network(nn.Linear(1, 1), Family("dit", ("dit",), modality="image"))
    with pytest.raises(AerogelError, match=r"^needles are long prompts of text, and dit is a diffusion model; give a file with prompts$"):
        CalibrationRequest("needles").shown(painter)


def test_measures_read_needles_where_they_can(book: str) -> None:
    options = [f"needle_recall.source={book}", "needle_recall.length=160", "needle_recall.count=1", "needle_recall.depths=[0.5]"]
    found = aerogel.measure(network(), measures=["needle_recall"], data="needles:3", overrides=options)
    assert found["original"]["needle_recall"]["keys"] == 3
    for measures in (["perplexity"], ["size"]):
        with pytest.raises(AerogelError, match=r"^the data would be read by none of the measures; take needle_recall, or leave it out$"):
            aerogel.measure(network(), measures=measures, data="needles:3")
