"""Each rule against its formula written out, token by token; what a policy measures, and how it is kept and refused."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import aerogel
from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.methods.experts.diep import Diep, DiepState, likeness
from aerogel.methods.experts.modes import Modes, ModesState
from aerogel.methods.experts.naee import Naee, NaeeState
from aerogel.methods.experts.odp import Odp, importance
from aerogel.methods.experts.policy import ExpertSkippingPolicy
from aerogel.methods.experts.reduced_topk import ReducedTopk, ReducedTopkState
from aerogel.methods.experts.single_threshold import SingleThreshold, SingleThresholdState
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Skipping, experts_of, skipping
from aerogel.runtime.expert_skipping.thresholds import tail_over_head
from aerogel.runtime.token_types import PADDING, SPECIAL, TEXT, VISION, Vocabulary
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened, output

SHARES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])


def routed(layer: int = 0, kinds: tuple[int, ...] = (TEXT, TEXT, TEXT), received: Tensor | None = None, decoding: bool = False) -> Routed:
    index_TK = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3], [2, 3, 1, 0]])
    return Routed(layer, torch.ones(3, 8), SHARES, index_TK, torch.tensor([kinds]), decoding, received)


MODEL: dict[str, Any] = {"layers": 2, "experts": 4, "top_k": 2, "vision": (), "special": ()}
"""What a state says of the model."""


def calibrated(step: dict[str, Any], name: str = "qwen3_vl_moe") -> tuple[Network, ExpertSkippingPolicy[Any], Any]:
    network = opened(name)
    (method,) = (one.method for one in Recipe.parse({"steps": [step]}).steps)
    assert isinstance(method, ExpertSkippingPolicy)
    return network, method, method.calibrate(network, FAMILIES[name].calls(3))


def kept(rule: Rule, given: Routed) -> list[list[bool]]:
    result: list[list[bool]] = rule(given).tolist()
    return result


def test_tail_over_head_by_hand() -> None:
    for row, got in zip(SHARES.tolist(), tail_over_head(SHARES).tolist(), strict=True):
        ranks = sorted(range(4), key=lambda place: -row[place])
        for rank, place in enumerate(ranks):
            before, behind = (sum(row[other] for other in part) for part in (ranks[:rank], ranks[rank:]))
            assert got[place] == (pytest.approx(behind / before) if before else float("inf"))


def test_lower_k_keeps_the_best() -> None:
    rule = ReducedTopk(k=2).rule(ReducedTopkState(**MODEL, k=2))
    assert kept(rule, routed())[:2] == [[True, True, False, False], [False, False, True, True]]
    assert rule(routed()).sum(-1).tolist() == [2, 2, 2]


def test_naee_with_two_experts_is_the_published_rule() -> None:
    """The second goes where it weighs less than beta times the first."""
    share_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.35, 0.65]])
    given = Routed(1, torch.ones(3, 8), share_TK, torch.zeros(3, 2, dtype=torch.long), torch.zeros(1, 3), False, None)
    rule = Naee().rule(NaeeState(**MODEL, beta=torch.tensor([9.0, 0.5]), scale=1.0))
    assert kept(rule, given) == [[True, True], [True, False], [True, True]]


def test_naee_takes_medians_of_each_layer() -> None:
    network, _, state = calibrated({"naee": {}}, "mixtral")
    ratios: dict[int, list[float]] = {0: [], 1: []}

    def watch(seen: Routed) -> Tensor:
        for row, kind in zip(seen.share_TK.tolist(), seen.kind_T.tolist(), strict=True):
            if kind not in (SPECIAL, PADDING):
                ratios[seen.layer].append(min(row) / max(row))
        return torch.ones_like(seen.index_TK, dtype=torch.bool)

    with skipping(network, Skipping(watch, Vocabulary.of(network))):
        for call in FAMILIES["mixtral"].calls(3):
            network.run(call)
    for layer, values in ratios.items():
        assert state.beta[layer] == pytest.approx(statistics.median_low(values))


def test_odp_importance_by_hand() -> None:
    norm_BS, received_BS = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9.0, 0.6, 0.9, 0.5]])
    alive_BS = torch.tensor([[False, True, True, True]])
    expected = [-float("inf"), 2 * 0.6 / 3, 3 * 0.9 / 2, 4 * 0.5 / 1]
    assert importance(norm_BS, received_BS, alive_BS, as_published=False)[0].tolist() == pytest.approx(expected)
    flat = [-float("inf"), 2 / 3, 3 / 2, 4 / 1]
    assert importance(norm_BS, received_BS, alive_BS, as_published=True)[0].tolist() == pytest.approx(flat)


def test_odp_spares_and_strips_tokens_of_a_prompt_only() -> None:
    """The least important of three tokens loses all experts, the most important keeps all; not when a token is written."""
    rule = Odp(kept=0.4, dropped=0.3, layers=1).below(0.5)
    received = torch.tensor([[0.4, 0.1, 3.0]])  # 8 * 0.4 / 3, 8 * 0.1 / 2 and 8 * 3 / 1
    ours = kept(rule, routed(received=received))
    assert ours[0] == [True, True, False, False]  # the rule without exceptions: 1, 0.25 and 0.05 beside what stands before
    assert ours[1] == [False] * 4
    assert ours[2] == [True] * 4
    assert sum(kept(rule, routed(received=None))[2]) == 3
    assert kept(rule, routed(received=None)) == kept(rule, routed(layer=1, received=received))


def test_likeness_is_one_for_equal_experts_and_does_not_mind_scale() -> None:
    y_ETH = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    y_ETH[1] = 3 * y_ETH[0] + 1
    alike_EE = likeness(y_ETH)
    assert alike_EE[0, 1] == pytest.approx(1, abs=1e-5)
    assert alike_EE[0, 2] < 0.5
    x, y = (one - one.mean(0) for one in (y_ETH[0].double(), y_ETH[2].double()))
    cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert alike_EE[0, 2] == pytest.approx(float(cka), abs=1e-5)


def test_diep_skips_more_readily_what_is_alike() -> None:
    alike = torch.eye(4).clamp(min=0.2)[None].clone()
    alike[0, 3, 1] = 1.0  # the best expert of the first token, and its second
    rule = Diep().rule(DiepState(**MODEL, alike=alike, beta=1.1))
    assert kept(rule, routed())[0] == [True, False, True, False]  # 1 / 1, 0.25 / 0.2 and 0.053 / 0.2


def test_modes_scores_are_importance_times_share() -> None:
    importance_LM = torch.tensor([[0.8, 0.1], [0.2, 0.9]])
    state = ModesState(**MODEL, importance=importance_LM, power=1.0, thresholds=torch.tensor([0.1, 0.05]))
    rule = Modes().rule(state)
    rooted = Modes().rule(replace(state, importance=importance_LM**2, power=0.5))
    assert all(torch.equal(rooted(routed(layer)), rule(routed(layer))) for layer in (0, 1))
    for layer in (0, 1):
        given = routed(layer, (TEXT, VISION, SPECIAL))
        for row, kind, got in zip(SHARES.tolist(), (0, 1, 0), kept(rule, given), strict=True):
            weight, threshold = float(state.importance[layer, kind]), float(state.thresholds[kind])
            assert got == [not weight * share < threshold for share in row]


def test_modes_importance_is_the_divergence_without_a_layer() -> None:
    """Against a network whose experts give nothing to the tokens of a modality, computed from its logits as they stand."""
    network, _, state = calibrated({"modes": {"ratio": 0.4, "points": 4}})
    assert state.importance.sum(0).tolist() == pytest.approx([1, 1])
    assert (state.importance >= 0).all()
    calls = FAMILIES["qwen3_vl_moe"].calls(3)
    for column, kind in enumerate((TEXT, VISION)):
        errors = []
        for module in experts_of(network).values():
            total = 0.0
            for call in calls:
                kind_BS = Vocabulary.of(network).kinds(call.kwargs)
                whole = log_softmax(output(network.module, call).float(), -1)
                own_T1 = (kind_BS.reshape(-1, 1) == kind).float()
                handle = module.register_forward_hook(lambda _, __, out, own_T1=own_T1: out * (1 - own_T1))
                other = log_softmax(output(network.module, call).float(), -1)
                handle.remove()
                alive_BS = (kind_BS[:, 1:] != PADDING) & (kind_BS[:, :-1] != PADDING)
                total += float((whole.exp() * (whole - other)).sum(-1)[:, :-1][alive_BS].clamp(min=0).sum())
            errors.append(total)
        expected = [error / sum(errors) for error in errors]
        assert state.importance[:, column].tolist() == pytest.approx(expected, rel=1e-3)


def test_a_modality_that_does_not_occur_has_no_importance() -> None:
    _, _, state = calibrated({"modes": {"ratio": 0.4, "points": 5}}, "qwen3_moe")
    assert state.importance[:, 1].tolist() == [0, 0]
    assert state.thresholds[1] == 0


def test_thresholds_of_zero_drop_nothing_and_beyond_all_everything() -> None:
    network, method, state = calibrated({"modes": {"ratio": 0.3, "points": 4, "protect_special": False}})
    calls = FAMILIES["qwen3_vl_moe"].calls(3)
    answers = Answers(network, calls, Vocabulary.of(network))
    none, all_ = (replace(state, thresholds=torch.full((2,), value)) for value in (0.0, float("inf")))
    assert answers.judge(method.skip(method.rule(none), Vocabulary.of(network))).ratio == 0
    assert answers.judge(method.skip(method.rule(none), Vocabulary.of(network))).error < 1e-6
    assert answers.judge(method.skip(method.rule(all_), Vocabulary.of(network))).ratio == 1
    before = output(network.module, calls[2])
    with method.on(network, all_):
        without = output(network.module, calls[2])
    handles = [module.register_forward_hook(lambda _, __, out: out * 0) for module in experts_of(network).values()]
    alive = calls[2].kwargs["attention_mask"].bool()
    torch.testing.assert_close(without[alive], output(network.module, calls[2])[alive])
    for handle in handles:
        handle.remove()
    assert torch.equal(output(network.module, calls[2]), before)


def test_what_is_dropped_in_the_first_layer_grows_with_the_threshold() -> None:
    network, method, state = calibrated({"modes": {"ratio": 0.3, "points": 4}})
    call = FAMILIES["qwen3_vl_moe"].calls(1)[0]
    first = next(iter(experts_of(network).values()))
    before: Tensor | None = None
    for threshold in (0.0, 0.1, 0.2, 0.3, 0.5):
        seen: list[Tensor] = []
        with method.on(network, replace(state, thresholds=torch.full((2,), threshold))):
            handle = first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1] == 4))
            network.run(call)
            handle.remove()
        assert before is None or (seen[0] | ~before).all()
        before = seen[0]
    assert before is not None
    assert before.any()


def test_labels_say_where_answers_are() -> None:
    network = opened("qwen3_moe")
    call = FAMILIES["qwen3_moe"].calls(1)[0]
    labels = torch.full_like(call.kwargs["input_ids"], -100)
    labels[:, -3:] = call.kwargs["input_ids"][:, -3:]
    answers = Answers(network, [Call((), {**call.kwargs, "labels": labels})], Vocabulary.of(network))
    assert answers.tokens == 6
    rule = ReducedTopk(k=1).rule(ReducedTopkState(**MODEL, k=1))
    skip = Skipping(rule, Vocabulary.of(network), protect=False)
    whole = log_softmax(output(network.module, call), -1)
    with skipping(network, skip):
        other = log_softmax(output(network.module, call), -1)
    expected = (whole.exp() * (whole - other)).sum(-1)[:, -4:-1].mean()
    assert answers.judge(skip).error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"reduced_topk": {}}, "one of k and ratio"),
        ({"reduced_topk": {"k": 3}}, "this router chooses 2 experts"),
        ({"modes": {"ratio": 1.2}}, "option 'ratio': expected a number from 0 to 1, got 1.2"),
        ({"naee": {"ratio": 0.9}}, "this rule drops 0.4.. of all assignments at most"),
        ({"odp": {"kept": 0.7, "dropped": 0.5}}, "together <= 1"),
        ({"modes": {"points": 1}}, "expected a number from 2 to 1,000, got 1"),
    ],
)
def test_options_out_of_range_are_refused(step: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        calibrated(step)


def test_a_saved_policy_is_on_when_opened_and_refused_elsewhere(tmp_path: Path) -> None:
    tiny = FAMILIES["qwen3_vl_moe"]
    result = aerogel.compress(
        tiny.build(), {"steps": [{"modes": {"ratio": 0.4, "points": 6}}]}, samples=tiny.calls(3), output=tmp_path / "out", measures=()
    )
    said = json.loads((tmp_path / "out" / "aerogel.json").read_text())
    state = said["policies"][0]["state"]
    assert (state["layers"], state["experts"], state["top_k"]) == (2, 4, 2)
    assert state["ratio"] == 0.4 <= state["skipped"]
    assert said["provenance"]["calibration"]["fingerprint"].startswith("sha256:")
    reopened, call = aerogel.load(tmp_path / "out", lazy=False), tiny.calls(1)[0]
    with policies.on(result.network, result.policies):
        assert torch.equal(output(reopened.module, call), output(result.network.module, call))
    live = tiny.build()
    before = output(live, call)
    with aerogel.skipping(live, tmp_path / "out"):
        skipped = output(live, call)
    torch.testing.assert_close(skipped, output(reopened.module, call), rtol=0, atol=2e-5)
    assert torch.equal(output(live, call), before)
    assert not any("experts.0" in name for name, _ in live.named_parameters())  # fused experts stayed fused
    other = open_model(FAMILIES["deepseek_v3"].build())
    with (
        pytest.raises(AerogelError, match="calibrated for 2 layers of 4 experts, 2 a token; this model has 1 of 4"),
        policies.on(other, result.policies),
    ):
        pass


def test_single_threshold_is_the_same_in_all_layers() -> None:
    rule = SingleThreshold().rule(SingleThresholdState(**MODEL, threshold=0.1, ratio=0.5))
    assert kept(rule, routed(0)) == kept(rule, routed(1)) == (SHARES >= 0.2).tolist()


def test_image_tokens_have_a_threshold_of_their_own() -> None:
    network, method, state = calibrated({"modes": {"ratio": 0.3, "points": 4}})
    call = FAMILIES["qwen3_vl_moe"].calls(1)[0]
    with (
        method.on(network, replace(state, thresholds=torch.tensor([0.0, float("inf")]))),
        counting(network, Vocabulary.of(network)) as tally,
    ):
        network.run(call)
    assert int((call.kwargs["input_ids"] == IMAGE_TOKEN).sum()) == tally.dropped_LKP[0, VISION, 0]
    assert tally.kept_LKP[:, TEXT].equal(tally.assignments_LKP[:, TEXT])


def test_of_several_powers_the_one_with_the_least_divergence_stays() -> None:
    options = {"ratio": 0.4, "points": 6}
    alone = {power: calibrated({"modes": {**options, "power": power}})[2] for power in (0.0, 0.5, 1.0)}
    _, _, state = calibrated({"modes": {**options, "power": [0.0, 0.5, 1.0]}})
    assert state.kl == min(one.kl for one in alone.values())
    assert state.power == min(alone, key=lambda power: alone[power].kl)
    assert torch.equal(state.thresholds, alone[state.power].thresholds)


def test_weights_are_raised_where_the_authors_raise_them() -> None:
    """NAEE, ODP and DiEP renormalise what is left, MoDES and fewer experts a token do not: a token whose second expert goes shows it."""
    network, given = opened("mixtral"), FAMILIES["mixtral"].calls(1)
    for name, raised in {"naee": True, "odp": True, "diep": True, "modes": False, "single_threshold": False, "reduced_topk": False}.items():
        (method,) = (one.method for one in Recipe.parse({"steps": [{name: {"k": 1} if name == "reduced_topk" else {}}]}).steps)
        assert isinstance(method, ExpertSkippingPolicy)
        best = Skipping(ReducedTopk(k=1).rule(ReducedTopkState(**MODEL, k=1)), Vocabulary.of(network), method.renormalise, method.keep_top1)
        sums: list[Tensor] = []
        with skipping(network, best):
            module = next(iter(experts_of(network).values()))
            handle = module.register_forward_pre_hook(lambda _, args, sums=sums: sums.append(args[2].sum(-1)))
            network.run(given[0])
            handle.remove()
        assert bool((sums[0] > 0.999).all()) == raised, name
