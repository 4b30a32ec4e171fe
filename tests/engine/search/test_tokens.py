"""The search for a rule that drops tokens, on a vision-language model with real images; seconds are the positions that blocks compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel import catalog
from aerogel.data import chats
from aerogel.data.chats import Chats
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.search import judging_answers
from aerogel.engine.search.held_out import halves
from aerogel.engine.search.searching import search
from aerogel.engine.search.tokens import Target, TokenSearch
from aerogel.errors import AerogelError
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.methods.prompt_tokens.random_blocks import RandomBlocks
from aerogel.methods.prompt_tokens.uniprefill import Uniprefill
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.predictions import Predictions
from aerogel.runtime.token_types import Vocabulary
from aerogel.runtime.tokens.decoder import decoder_of
from tests.folders import text_file
from tests.methods.matrix import made
from tests.methods.prompt_tokens.prompts import deep
from tests.questions import asked, untrained, written
from tests.words import tokenizer

COUNT = 4
RULES = ("divprune", "pyramid_drop", "visionzip")


class Positions:
    """A clock that goes on by one second for each position that a block computes."""

    def __init__(self, network: Network) -> None:
        self.seconds = 0.0
        for block in decoder_of(network).parts(network):
            block.register_forward_hook(self._add)

    def __call__(self) -> float:
        return self.seconds

    def _add(self, _: Any, args: tuple[Any, ...], output: Any) -> None:
        self.seconds += args[0].shape[0] * args[0].shape[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("chats"), 2 * COUNT)


def model() -> Network:
    torch.manual_seed(0)
    module, pair = untrained()
    module.generation_config.eos_token_id = list(range(0, module.config.text_config.vocab_size, 4))  # random replies end soon
    return open_model((module, pair), dtype=torch.float32)


def test_rules_are_brought_to_one_speed_and_the_best_is_saved(source: Path, tmp_path: Path) -> None:
    network, folder = model(), tmp_path / "out"
    options: dict[str, Any] = {"samples": Chats(source, COUNT), "only": (*RULES, "mustdrop"), "rounds": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 4)
        patch.setattr(judging_answers, "ExactMatch", partial(ExactMatch, new_tokens=4))
        findings = search(network, "tokens", "1.2x", clock=Positions(network), output=folder, **options)
    facts = findings.facts
    assert sorted(row["policy"] for row in facts["rows"]) == list(RULES)
    assert all(1.15 < row["prefill_speedup"] < 1.6 for row in facts["rows"])
    assert [one["policy"] for one in facts["left_out"]] == ["mustdrop"]
    assert facts["left_out"][0]["reason"].startswith("a token of an image is no single patch of a square grid")
    kl = {row["policy"]: row["kl"] for row in facts["rows"]}
    assert findings.best is not None
    assert findings.best.step.name == min(kl, key=kl.__getitem__)
    assert facts["pictures"]
    assert all(len(one["kept"]) <= one["rows"] * one["columns"] for one in facts["pictures"])
    report = (folder / "report.html").read_text("utf-8")
    assert findings.best.step.name in report
    assert "What stays of an image" in report
    with aerogel.cached(network, folder):
        pass


def test_a_share_is_met_by_the_tokens_that_are_computed(source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        patch.setattr(judging_answers, "ExactMatch", partial(ExactMatch, new_tokens=2))
        found = search(model(), "tokens", "40%", samples=Chats(source, 2), only=["divprune"], rounds=1)
    (row,) = found.facts["rows"]
    assert 0.25 < row["kept"] <= 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["visionzip", "sparsevlm", "dart"])
def test_a_search_finds_the_same_divergence_in_batches(name: str) -> None:
    """Of questions of unlike length, about one image or several; the measure of answers does so too."""
    network, held = model(), asked(4)
    policy = made(name)
    state = policy.calibrate(network, chats.calls(held, network.processor, 1))
    kl, moved = [], []
    for batch in (1, 3):
        calls = chats.calls(held, network.processor, batch, padded=True)
        predictions = Predictions(network, calls, Vocabulary.of(network))
        measure = ExactMatch(batch=batch)
        dense = model()
        with policy.on(network, state):
            kl.append(predictions.moved().kl)
            moved.append(measure._moved(network, dense, held)["kl"])
    assert len({len(call.kwargs["input_ids"][0]) for call in chats.calls(held, network.processor, 1)}) > 1
    assert kl[0] > 1e-4
    assert kl[1] == pytest.approx(kl[0], abs=1e-5)
    assert moved == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("budget", ["0.5", "1x", "0%", "100%", "fast", "nanx"])
def test_budgets_that_are_none(budget: str) -> None:
    with pytest.raises(AerogelError, match="neither a speed-up of prefill"):
        Target.of(budget)


def test_rules_for_long_prompts_are_judged_on_what_is_read_behind_them(tmp_path: Path) -> None:
    """The clock of a prompt's forward is the time to its first token; tokens that come later are few."""
    network = deep()
    network.processor = tokenizer()
    book, folder = text_file(tmp_path / "book.txt", 3000), tmp_path / "out"
    small = [
        f"{rule}.{option}" for rule in ("prompt_pruning", "random_blocks") for option in ("min_length=96", "block=4", "local=8", "at=[0.3]")
    ]
    rules = ("prompt_pruning", "random_blocks", "fastkv", "divprune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        patch.setattr(PromptPruning, "strength", classmethod(lambda cls, share: {"keep": (share,)}))
        patch.setattr(RandomBlocks, "strength", classmethod(lambda cls, share: {"keep": (share,)}))
        found = search(
            network, "tokens", "1.5x", samples=Samples(book, 2, 96), only=rules, output=folder, rounds=1, clock=Positions(network),
            overrides=[*small, "prompt_pruning.sub_block=2", "prompt_pruning.q_window=4"],
        )  # fmt: skip
    facts = found.facts
    assert facts["prompt"] == 96
    assert facts["answer_tokens"] == 2 * 32
    assert {row["policy"] for row in facts["rows"]} == {"prompt_pruning", "random_blocks"}
    assert all(row["kl"] > 0 and row["right"] is None and 1.47 <= row["prefill_speedup"] < 2 for row in facts["rows"])
    reasons = {one["policy"]: one["reason"] for one in facts["left_out"]}
    assert reasons["fastkv"].startswith("the longest prompt of the calibration data has 96 tokens, and prompts are pruned from 4096 on")
    assert "divprune" in reasons
    assert "random_blocks" in (folder / "report.html").read_text("utf-8")
    with aerogel.cached(network, folder):
        pass


@pytest.mark.parametrize("budget", ["1.2x", "80%"])
def test_every_rule_for_long_prompts_is_brought_to_the_budget(budget: str, tmp_path: Path) -> None:
    """All of the folder: one that names no budget, or cannot reach one that blocks this small allow, is a failure here."""
    classes = {name: catalog.find("methods", name) for name in catalog.names("methods")}
    rules = sorted(name for name, cls in classes.items() if cls.__module__.startswith("aerogel.methods.prompt_tokens."))
    network = deep()
    network.processor = tokenizer()
    small = {"min_length": 96, "block": 4, "sub_block": 2, "q_window": 4, "sink": 2, "local": 8, "first": 4, "window": 4, "kernel": 3}
    overrides = [
        f"{rule}.{option}={value}" for rule in rules for option, value in small.items() if option in classes[rule].__dataclass_fields__
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        found = search(
            network, "tokens", budget, samples=Samples(text_file(tmp_path / "book.txt", 3000), 2, 96), only=rules, overrides=overrides,
            rounds=1, clock=Positions(network),
        )  # fmt: skip
    assert found.facts["left_out"] == []
    assert sorted(row["policy"] for row in found.facts["rows"]) == rules
    assert {"uniprefill", "fastkv"} <= set(rules)
    for row in found.facts["rows"]:
        assert row["kept"] <= 0.8 if budget == "80%" else row["prefill_speedup"] >= 0.98 * 1.2
        assert row["kl"] > 0


def test_a_rule_goes_to_a_budget_by_the_option_that_it_names(tmp_path: Path) -> None:
    """UniPrefill by the attention that stays: the largest share of it that leaves few enough tokens; what misses says how far it went."""
    network = deep()
    network.processor = tokenizer()
    small = ["uniprefill.min_length=96", "uniprefill.block=4", "uniprefill.local=8", "uniprefill.first=4"]
    options: dict[str, Any] = {"samples": Samples(text_file(tmp_path / "book.txt", 3000), 2, 96), "only": ["uniprefill"], "rounds": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 2)
        found, missed, clash = (
            search(network, "tokens", budget, overrides=[*small, *more], **options).facts
            for budget, more in (("60%", ()), ("20%", ()), ("60%", ["uniprefill.mass=0.5"]))
        )
    (row,) = found["rows"]
    name, values = Uniprefill.search_space or ("", ())
    mass = row["step"]["uniprefill"][name]
    weaker = values[values.index(mass) - 1]
    policy = Uniprefill(mass=weaker, min_length=96, block=4, local=8, first=4)
    calls = halves(network, Samples(options["samples"].source, 2, 96 + 32), 0)[0]
    state = policy.calibrate(network, [Call((), {"input_ids": call.kwargs["input_ids"][:, :96]}) for call in calls])
    assert row["kept"] <= 0.6 < state.kept
    assert missed["left_out"][0]["reason"].startswith("at its strongest (mass=0.0) ")
    assert missed["left_out"][0]["reason"].endswith(" of the tokens are computed on average over the blocks")
    assert clash["left_out"] == [{"policy": "uniprefill", "reason": "uniprefill.mass is what the budget says here; leave it out"}]


def test_rules_for_long_prompts_are_not_judged_on_chats(source: Path) -> None:
    found = search(model(), "tokens", samples=Chats(source, 2), only=["recent_blocks"], rounds=1)
    (left_out,) = found.facts["left_out"]
    assert (
        left_out["reason"]
        == "it drops tokens of text, so it is compared on what is read behind prompts of text: give text or needles by --data"
    )


def test_what_cannot_be_searched(source: Path) -> None:
    with pytest.raises(AerogelError, match="drops no tokens"):
        TokenSearch(None, ["gptq"], (), 1, lambda _: None, lambda: 0.0)
    clash = search(model(), "tokens", samples=Chats(source, 2), only=["divprune"], overrides=["divprune.keep=0.5"], rounds=1)
    assert clash.facts["left_out"] == [{"policy": "divprune", "reason": "divprune.keep is what the budget says here; leave it out"}]
