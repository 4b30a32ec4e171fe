"""Effects on the zoo's trained MoE model: what skipping costs, in which order rules stand, that the search finds what there is."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

import aerogel
from aerogel.data import chats
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.methods.experts.policy import ExpertSkippingPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from tests.questions import ZOO, asked, written

pytestmark = pytest.mark.quality


@pytest.fixture(scope="module")
def network() -> Network:
    return aerogel.load(ZOO / "fashion-vlm", lazy=False, dtype=torch.float32)


@pytest.fixture(scope="module")
def calls(network: Network) -> list[Call]:
    return chats.calls(asked(32, seed=7), network.processor, batch=16, padded=True)


def judged(network: Network, calls: list[Call], step: dict[str, Any]) -> Any:
    (made,) = Recipe.parse({"steps": [step]}).steps
    assert isinstance(made.method, ExpertSkippingPolicy)
    return made.method.calibrate(network, calls)


@pytest.mark.slow
def test_it_sees_what_it_is_asked_about(network: Network, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Held-out questions; blind, which is with black images, it is right far more rarely."""
    folder = tmp_path_factory.mktemp("held")
    seeing = ExactMatch(source=str(written(folder, 96, seed=11)), count=96).measure(network)["right"]
    source = folder / "samples.jsonl"
    for path in sorted(folder.glob("*.png")):
        path.write_bytes(_dark(path.read_bytes()))
    blind = ExactMatch(source=str(source), count=96).measure(network)["right"]
    assert seeing > 0.5
    assert blind < 0.6 * seeing


def _dark(png: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        Image.new(image.mode, image.size).save(out, "PNG")
    return out.getvalue()


def test_fewer_experts_cost_more(network: Network, calls: list[Call]) -> None:
    three, two, one = (judged(network, calls, {"reduced_topk": {"k": k}}).kl for k in (3, 2, 1))
    assert 0 < three < two < one


@pytest.mark.slow
def test_the_first_layer_matters_most_to_text(network: Network, calls: list[Call]) -> None:
    state = judged(network, calls, {"modes": {"ratio": 0.5, "points": 4}})
    assert state.importance[:, 0].argmax() == 0
    assert state.importance.sum(0).tolist() == pytest.approx([1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_the_walk_finds_the_optimum_of_a_small_grid(network: Network, calls: list[Call], ratio: float) -> None:
    options = {"ratio": ratio, "points": 7, "power": 0.25}
    few = judged(network, calls[:1], {"modes": options})
    all_ = judged(network, calls[:1], {"modes": {**options, "exhaustive": True}})
    assert few.kl <= 1.05 * all_.kl
    assert few.evaluations <= 3 * 8 < all_.evaluations
    assert all_.against_monotony["ratio"] == 0


@pytest.mark.slow
def test_modes_beats_its_rivals_where_much_is_skipped(network: Network, calls: list[Call]) -> None:
    """At three quarters of all pairs, which rules that keep each token's best expert do not reach."""
    modes = judged(network, calls, {"modes": {"ratio": 0.75, "points": 16, "power": 0.25}})
    plain = judged(network, calls, {"single_threshold": {"ratio": 0.75}})
    assert min(modes.skipped, plain.skipped) >= 0.75
    assert modes.kl < 0.5 * plain.kl
    lower = judged(network, calls, {"reduced_topk": {"k": 1}})
    assert lower.skipped < 0.75
    same = judged(network, calls, {"modes": {"ratio": lower.skipped, "points": 16, "power": 0.25}})
    naee = judged(network, calls, {"naee": {"ratio": lower.skipped - 0.01}})
    assert same.kl < 0.5 * min(lower.kl, naee.kl)


def test_padding_on_the_left_changes_no_prediction(network: Network) -> None:
    """Chats of different length together give what each gives alone, with experts skipped."""
    questions = asked(6, seed=3)
    together = judged(network, chats.calls(questions, network.processor, batch=6, padded=True), {"reduced_topk": {"k": 2}})
    alone = judged(network, chats.calls(questions, network.processor, batch=1), {"reduced_topk": {"k": 2}})
    assert torch.tensor(together.kl) == pytest.approx(alone.kl, rel=1e-3)
    assert together.skipped == pytest.approx(alone.skipped, abs=1e-9)
