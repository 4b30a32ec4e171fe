"""The search for experts to skip: every rule at several shares, judged on chats that none was calibrated on, and a folder for the best.

Time is told by a clock that moves when an expert multiplies a token's row: no test waits for a busy machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import log_softmax

import aerogel
from aerogel import catalog
from aerogel.data import chats, text
from aerogel.data.chats import Chats
from aerogel.engine import policies
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.search import judging_answers
from aerogel.engine.search.searching import Findings, search
from aerogel.engine.search.skips import BUDGET, RATIOS, SkipSearch
from aerogel.errors import AerogelError
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.layers.experts import ExpertList
from aerogel.methods.experts.policy import ExpertSkippingPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.expert_skipping.routing import experts_of
from aerogel.runtime.token_types import SPECIAL, VISION, Vocabulary
from tests.clocks import Manual
from tests.folders import model_folder, text_file
from tests.questions import ZOO, untrained, written
from tests.tiny import output

COUNT = 6
REPLY = 12
"""Tokens of a reply at most."""
OPTIONS = ("modes.points=6", "diep.tokens=16")
ALL = [name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), ExpertSkippingPolicy)]


class Ticks(Manual):
    """A clock that an MoE model moves: by one at each forward, and by one for each token-expert assignment that is computed."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        network.module.register_forward_pre_hook(self.forward)
        for experts in experts_of(network).values():
            experts.register_forward_hook(self.assignments)

    def forward(self, *_: Any) -> None:
        self.seconds += 1

    def assignments(self, module: Any, args: Any, _: Any) -> None:
        self.seconds += int((args[1] < module.num_experts).sum())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("chats"), 2 * COUNT)


def moe_model() -> Network:
    torch.manual_seed(0)
    model, pair = untrained()
    model.generation_config.eos_token_id = list(range(0, model.config.text_config.vocab_size, 4))  # random replies end after a few tokens
    return open_model((model, pair), dtype=torch.float32, unfuse_experts=False)


@pytest.fixture(scope="module")
def found(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Findings, Path]:
    network, folder = moe_model(), tmp_path_factory.mktemp("search") / "out"
    options: dict[str, Any] = {
        "samples": Chats(source, COUNT),
        "overrides": OPTIONS,
        "rounds": 1,
        "clock": Ticks(network),
        "output": folder,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging_answers, "NEW_TOKENS", 4)
        patch.setattr(judging_answers, "ExactMatch", partial(ExactMatch, new_tokens=REPLY))
        return network, search(network, "skip", **options), folder


def halves(source: Path) -> tuple[list[chats.Chat], list[chats.Chat]]:
    drawn = chats.drawn(chats.read(source), 2 * COUNT, 0)
    return drawn[:COUNT], drawn[COUNT:]


def row(findings: Findings, policy: str, asked: float) -> dict[str, Any]:
    (one,) = (one for one in findings.facts["rows"] if (one["policy"], one["asked"]) == (policy, asked))
    return dict(one)


def made(findings: Findings, network: Network, policy: str, asked: float, source: Path) -> CalibratedPolicy:
    """The same policy, calibrated outside of the search on the first half."""
    (step,) = Recipe.parse({"steps": [row(findings, policy, asked)["step"]]}).steps
    return policies.calibrated(network, step, chats.calls(halves(source)[0], network.processor, padded=True))


@pytest.mark.slow
def test_every_rule_has_rows_or_a_reason(found: Any) -> None:
    findings = found[1]
    assert findings.facts["ratios"] == sorted({*RATIOS, BUDGET})
    seen = {one["policy"] for one in findings.facts["rows"]}
    reasons = {one["policy"]: one["reason"] for one in findings.facts["left_out"]}
    assert ALL == ["diep", "modes", "naee", "odp", "reduced_topk", "single_threshold"]
    assert sorted(seen | set(reasons)) == ALL
    at_budget = {one["policy"] for one in findings.facts["rows"] if one["asked"] == BUDGET and one["met"]}
    assert sorted(at_budget | set(reasons)) == ALL, "who is not there at the budget says why"
    assert not at_budget & set(reasons)


@pytest.mark.slow
def test_a_rule_that_keeps_the_best_expert_ends_where_it_can(found: Any) -> None:
    """Three of four experts of each token but the chat's marks: the same for all of them, and nothing behind it."""
    asked = {name: [one["asked"] for one in found[1].facts["rows"] if one["policy"] == name] for name in ("naee", "reduced_topk", "modes")}
    assert asked == {"naee": [0.5, 0.67], "reduced_topk": [0.5, 0.67], "modes": [0.5, 0.67, 0.75, 0.88]}
    assert row(found[1], "naee", 0.67)["ratio"] == row(found[1], "reduced_topk", 0.67)["ratio"]
    assert not row(found[1], "reduced_topk", 0.5)["met"], "half of the words' pairs are less than half of all"


@pytest.mark.slow
def test_rows_are_what_the_policy_does_to_the_other_half(found: Any, source: Path) -> None:
    network, findings, _ = found
    (call,) = chats.calls(halves(source)[1], network.processor, padded=True)
    labels_BS = call.kwargs["labels"]
    whole_BSV = network.run(Call((), {**call.kwargs, "labels": None})).logits
    with policies.on(network, [made(findings, network, "modes", BUDGET, source)]):
        ours_BSV = network.run(Call((), {**call.kwargs, "labels": None})).logits
    kls, same = [], []
    for row_S, whole_SV, ours_SV in zip(labels_BS, whole_BSV, ours_BSV, strict=True):
        for place in range(1, len(row_S)):
            if row_S[place] != -100:
                p_V, q_V = (log_softmax(logits_SV[place - 1].double(), -1) for logits_SV in (whole_SV, ours_SV))
                kls.append(float((p_V.exp() * (p_V - q_V)).sum()))
                same.append(float(p_V.argmax() == q_V.argmax()))
    at = row(findings, "modes", BUDGET)
    assert at["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert at["top1"] == pytest.approx(sum(same) / len(same))
    assert findings.facts["answer_tokens"] == len(kls)
    assert findings.facts["provenance"]["calibration"]["fingerprint"] == chats.fingerprint(halves(source)[0])


@pytest.mark.slow
def test_replies_and_shares_are_those_of_the_measure(found: Any, source: Path, tmp_path: Path) -> None:
    network, findings, _ = found
    for policy in ("modes", "reduced_topk"):
        with policies.on(network, [made(findings, network, policy, BUDGET, source)]):
            theirs = ExactMatch(source=str(_file(source, tmp_path / policy)), count=COUNT, new_tokens=REPLY).measure(network)
        ours = row(findings, policy, BUDGET)
        assert ours["right"] == theirs["right"]
        assert ours["skipped"]["decode"] == pytest.approx(theirs["skipped"]["decode"], abs=1e-3)
        assert ours["skipped"]["prefill"] == pytest.approx(theirs["skipped"]["prefill"], abs=1e-3)


def _file(source: Path, folder: Path) -> Path:
    """The second half as a file of its own, beside links to the images."""
    folder.mkdir()
    for image in source.parent.glob("*.png"):
        (folder / image.name).symlink_to(image)
    wanted = [chat.messages for chat in halves(source)[1]]
    lines = [line for line in source.read_text().splitlines() if json.loads(line)["messages"] in wanted]
    (folder / source.name).write_text("\n".join(lines))
    return folder / source.name


@pytest.mark.slow
def test_speeds_are_ratios_of_turns(found: Any, source: Path) -> None:
    """Each forward of 6 layers takes 1 + pairs: with reduced_topk at 0.67 a word has one expert of four, marks all."""
    at, facts = row(found[1], "reduced_topk", BUDGET), found[1].facts
    assert facts["prefill_seconds"] == 1 + 6 * 4 * facts["batch"] * facts["prompt"]
    assert facts["decode_seconds"] == 1 + 6 * 4 * facts["batch"]
    network = found[0]
    (prompts,) = chats.prompts(halves(source)[1], network.processor, COUNT)
    kind_BS = Vocabulary.of(network).kinds(prompts)
    left = int((kind_BS <= VISION).sum()) + 4 * int((kind_BS == SPECIAL).sum())
    assert at["prefill_speedup"] == pytest.approx(facts["prefill_seconds"] / (1 + 6 * left)), "padding has none at all"
    assert 1 <= at["decode_speedup"] <= (1 + 24 * COUNT) / (1 + 6 * COUNT)


@pytest.mark.slow
def test_the_best_moves_predictions_least_and_its_folder_puts_it_on(found: Any, source: Path) -> None:
    network, findings, folder = found
    enough = [one for one in findings.facts["rows"] if one["asked"] == BUDGET and one["met"]]
    best = min(enough, key=lambda one: one["kl"])
    assert findings.best is not None
    assert findings.best.step.as_dict() == best["step"]
    assert {path.name for path in folder.iterdir()} >= {"aerogel.json", "search.json", "report.html"}
    assert not list(folder.glob("model*")), "no weights"
    (call,) = chats.calls(halves(source)[1][:2], network.processor, padded=True)
    before = output(network.module, call)
    with aerogel.skipping(network.module, folder) as on:
        inside = output(network.module, call)
    assert on[0].step == findings.best.step
    assert not torch.equal(before, inside)
    assert torch.equal(before, output(network.module, call))
    assert "Aerogel search for expert skipping" in findings.report().read_text()


def test_a_folder_and_its_live_model_are_the_same_weights(source: Path, tmp_path: Path) -> None:
    """From a folder experts are opened one by one; the search fuses them again, and says the same fingerprint as a live model has."""
    options: dict[str, Any] = {"samples": Chats(source, 2), "only": ["reduced_topk"], "rounds": 1}
    opened = search(ZOO / "fashion-vlm", "skip", output=tmp_path / "out", **options)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(ZOO / "fashion-vlm")
    for live in (theirs, open_model(ZOO / "fashion-vlm", lazy=False)):
        with aerogel.skipping(live, tmp_path / "out"):  # a warning about other weights would be an error
            pass
    assert opened.facts["model"]["fingerprint"].startswith("sha256:")


def test_so_are_those_of_a_family_whose_checkpoints_hold_experts_apart(
    texts: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Network] = []
    own = SkipSearch.check

    def check(self: SkipSearch, network: Network, samples: Any) -> None:
        seen.append(network)
        own(self, network, samples)

    monkeypatch.setattr(SkipSearch, "check", check)
    search(texts[0], "skip", 0.5, samples=Samples(texts[1], 2, 24), only=["reduced_topk"], rounds=1, output=tmp_path / "out")
    assert not any(isinstance(part, ExpertList) for part in seen[0].module.modules()), "as transformers runs them"
    for live in (transformers.AutoModelForCausalLM.from_pretrained(texts[0]), open_model(texts[0], lazy=False)):
        with aerogel.skipping(live, tmp_path / "out"):
            pass


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    model_folder(folder / "model", "qwen3_moe")
    return folder / "model", text_file(folder / "words.txt", 400)


def test_text_is_continued_and_judged_by_what_stays_first(texts: Any) -> None:
    model, words = texts
    samples = Samples(words, count=3, length=24)
    findings = search(model, "skip", "50%", samples=samples, only=["single_threshold"], rounds=1)
    facts = findings.facts
    assert (facts["budget"], facts["right"], facts["chats"], facts["count"]) == (0.5, None, False, 3)
    assert facts["prompt"] == 12
    network = open_model(model, lazy=False)
    rows_NL = text.samples(network.processor, words, 6, 24, 0)
    assert facts["provenance"]["calibration"]["fingerprint"] == text.fingerprint(rows_NL[:3])
    (step,) = Recipe.parse({"steps": [row(findings, "single_threshold", 0.5)["step"]]}).steps
    measured = policies.calibrated(network, step, text.calls(rows_NL[:3]))
    whole_NLV = network.run(text.calls(rows_NL[3:])[0]).logits
    with policies.on(network, [measured]):
        ours_NLV = network.run(text.calls(rows_NL[3:])[0]).logits
    same = (whole_NLV.argmax(-1) == ours_NLV.argmax(-1))[:, :-1].float().mean()
    assert row(findings, "single_threshold", 0.5)["top1"] == pytest.approx(float(same))


def test_a_search_that_finds_nothing_keeps_nothing(texts: Any, tmp_path: Path) -> None:
    model, words = texts
    findings = search(model, "skip", 0.9, samples=Samples(words, 2, 24), only=["naee"], rounds=1, output=tmp_path / "out")
    assert findings.best is None
    assert [one["reason"] for one in findings.facts["left_out"]] == ["it drops 50.0% of all token-expert assignments at most"]
    assert json.loads((tmp_path / "out" / "aerogel.json").read_text())["policies"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": "1.5x"},
            "budget '1.5x' is no share of assignments to drop; give a number between 0 and 1, for example 0.67 or 67%",
        ),
        ({"budget": 1.0}, r"budget 1\.0 is no share"),
        ({"only": ["fora"]}, "fora skips no experts by a rule, so there is nothing to choose; leave it out"),
        ({"only": ["prune_experts"]}, "prune_experts skips no experts by a rule"),
        ({"overrides": ["modes.ratio=0.5"]}, "modes.ratio is what the budget says here; leave it out"),
        ({"samples": [Call((), {})]}, "give Samples, Chats or Needles, not recorded calls"),
    ],
)
def test_what_cannot_be_searched_is_refused(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        search(texts[0], "skip", **{"samples": Samples(texts[1], 2, 24), **options})


def test_one_sequence_cannot_calibrate_and_judge(texts: Any, tmp_path: Path) -> None:
    short = Samples(text_file(tmp_path / "short.txt", 30), 2, 24)
    with (
        pytest.warns(UserWarning, match="gives 1 of the 4 sequences"),
        pytest.raises(AerogelError, match="1 sequences: one half is calibrated on and the other judges; give more"),
    ):
        search(texts[0], "skip", samples=short)


def test_models_without_experts_or_with_a_rule_are_refused(texts: Sequence[Path], tmp_path: Path) -> None:
    model_folder(tmp_path / "dense", "llama")
    with pytest.raises(AerogelError, match="this llama model has no routed experts"):
        search(tmp_path / "dense", "skip")
    samples = Samples(texts[1], 2, 24)
    aerogel.compress(texts[0], {"steps": [{"reduced_topk": {"k": 1}}]}, samples=samples, output=tmp_path / "on", measures=())
    with pytest.raises(AerogelError, match="has reduced_topk on already; give the model that it was made for"):
        search(tmp_path / "on", "skip", samples=samples)
