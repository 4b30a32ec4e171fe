"""The share that a rule is asked to drop: how it is met, what a search keeps, and what a policy says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.methods.experts.modes import Modes
from aerogel.methods.experts.reduced_topk import ReducedTopk
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.expert_skipping.routing import Skipping, shape_of
from aerogel.runtime.expert_skipping.thresholds import UnreachableError, grid
from aerogel.runtime.token_types import Vocabulary
from tests.methods.experts.test_skipping import calibrated
from tests.tiny import FAMILIES, opened


@pytest.mark.parametrize(
    "step",
    [{name: {"ratio": 0.3}} for name in ("single_threshold", "naee", "odp", "diep")] + [{"modes": {"ratio": 0.3, "points": 12}}],
    ids=lambda step: next(iter(step)),
)
def test_a_ratio_is_met_and_what_is_said_of_it_is_true(step: dict[str, Any]) -> None:
    network, method, state = calibrated(step)
    assert 0.3 <= state.skipped < 0.5
    with method.on(network, state), counting(network, Vocabulary.of(network)) as tally:
        for call in FAMILIES["qwen3_vl_moe"].calls(3):
            network.run(call)
    assert tally.ratio() == pytest.approx(state.skipped)
    assert state.kl == pytest.approx(
        Answers(network, FAMILIES["qwen3_vl_moe"].calls(3), Vocabulary.of(network))
        .judge(method.skip(method.rule(state), Vocabulary.of(network)), method.attends)
        .error
    )


@pytest.mark.parametrize("grids", ["modality", "single"])
def test_frontier_finds_what_looking_at_all_pairs_finds(grids: str) -> None:
    options = {"ratio": 0.4, "points": 6, "thresholds": grids}
    _, _, few = calibrated({"modes": options})
    _, _, all_ = calibrated({"modes": {**options, "exhaustive": True}})
    if all_.against_monotony["error"] == all_.against_monotony["ratio"] == 0:
        assert few.kl == all_.kl
    assert few.kl <= 1.1 * all_.kl
    assert few.evaluations <= 3 * 6 + 3 < all_.evaluations or grids == "single"


def test_grid_splits_scores_evenly() -> None:
    values = torch.arange(1, 101).float()
    thresholds = grid(values, 11)
    assert thresholds[0] == 0
    assert (values >= thresholds[-1]).sum() == 0
    assert [int((values < one).sum()) for one in thresholds[1:-1]] == pytest.approx([11 * n for n in range(1, 10)], abs=1)
    assert grid(torch.ones(5), 4) == [0.0, 1.0, float(torch.nextafter(torch.ones(1), torch.full((1,), 2.0)))]


def test_evaluations_outlive_a_search_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"modes": {"ratio": 0.4, "points": 6, "evaluations": str(tmp_path)}}
    real, left = Answers.judge, [9]

    def stopping(self: Answers, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Answers, "judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrated(step)
    known = len((tmp_path / "power-1.jsonl").read_text().splitlines()) - 1
    assert known == 5  # four went into importance
    monkeypatch.setattr(Answers, "judge", real)
    _, _, state = calibrated(step)
    _, _, afresh = calibrated({"modes": {"ratio": 0.4, "points": 6}})
    assert torch.equal(state.tried, afresh.tried)


def test_ratios_on_the_same_answers_share_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = opened("qwen3_vl_moe"), FAMILIES["qwen3_vl_moe"].calls(3)
    judged: list[Skipping] = []
    own = Answers.judge

    def judge(self: Answers, skip: Skipping, attention: bool = False) -> Any:
        judged.append(skip)
        return own(self, skip, attention)

    monkeypatch.setattr(Answers, "judge", judge)
    alone = [Modes(ratio=ratio, points=6).calibrate(network, given) for ratio in (0.3, 0.5)]
    apart = len(judged)
    judged.clear()
    answers = Answers(network, given, Vocabulary.of(network))
    shared = [Modes(ratio=ratio, points=6).calibrated_on(answers) for ratio in (0.3, 0.5)]
    layers = shape_of(network).layers
    assert len(judged) <= apart - 2 * layers, "importance at least is measured once"
    for ours, theirs in zip(shared, alone, strict=True):
        assert torch.equal(ours.thresholds, theirs.thresholds)
        assert torch.equal(ours.importance, theirs.importance)
        assert (ours.kl, ours.skipped) == (theirs.kl, theirs.skipped)


def test_lower_k_leaves_an_expert_whatever_the_ratio() -> None:
    network, given = opened("mixtral"), FAMILIES["mixtral"].calls(1)
    with pytest.raises(
        UnreachableError, match=r"ratio 0\.6 cannot be reached: this rule drops 0\.500 of all assignments at most"
    ) as refused:
        ReducedTopk(ratio=0.6).calibrate(network, given)
    assert refused.value.most == 0.5
    with pytest.raises(AerogelError, match=r"reduced_topk: option 'ratio': expected a number from 0 to 1, got 1\.5"):
        ReducedTopk(ratio=1.5)
    assert ReducedTopk(k=0).calibrate(network, given).skipped > 0.5, "who says none means none"
