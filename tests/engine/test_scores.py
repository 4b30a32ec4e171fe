"""Measuring: what is chosen, whose it is, and what is told on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from aerogel.engine.opening import open_model
from aerogel.engine.progress import Event
from aerogel.engine.scores import measure
from aerogel.errors import AerogelError
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.perplexity import Perplexity
from aerogel.evaluate.size import Size
from aerogel.evaluate.speed import Speed
from aerogel.model.network import Network
from tests.folders import model_folder, text_file
from tests.tiny import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def network(folder: Path) -> Network:
    return open_model(model_folder(folder / "model"), lazy=False)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return str(text_file(folder / "text.txt", 200))


def test_a_denoiser_is_measured_by_what_fits_it() -> None:
    scores = measure(open_model(FAMILIES["dit"].build()), speed=True)
    assert set(scores) == {"original"}
    assert set(scores["original"]) == {"size"}


def test_a_network_without_a_tokenizer_reads_no_text() -> None:
    assert set(measure(open_model(FAMILIES["llama"].build()))["original"]) == {"size"}


def test_without_an_original_nothing_is_compared(network: Network) -> None:
    assert {"perplexity", "size"} <= set(measure(network)["original"])
    assert "kl_divergence" not in measure(network)["original"]
    with pytest.raises(AerogelError, match="kl_divergence compares with the original"):
        measure(network, measures=["kl_divergence"])


def test_both_sides_are_measured_and_told(network: Network, text: str) -> None:
    seen: list[Event] = []
    chosen = [Perplexity(source=text), KlDivergence(source=text), Size()]
    scores = measure(network, network, chosen, seen.append)
    assert set(scores["original"]) == {"perplexity", "size"}
    assert set(scores["compressed"]) == {"perplexity", "kl_divergence", "size"}
    assert scores["compressed"]["kl_divergence"]["top1"] == 1.0
    assert [(event.done, event.total) for event in seen] == [(0, 6), (1, 6), (2, 6), (4, 6), (5, 6), (6, 6)]


def test_speed_is_measured_in_turns(network: Network) -> None:
    scores = measure(network, network, [Speed(prompt=8, new_tokens=4, rounds=1)])
    for whose in ("original", "compressed"):
        assert scores[whose]["speed"]["decode_tokens_per_second"] == 1.0, "a row a step, and the tests' clock says a second"
    assert set(measure(network, measures=[Speed(prompt=8, new_tokens=4, rounds=1)])) == {"original"}


def test_unknown_measures_name_the_nearest(network: Network) -> None:
    with pytest.raises(AerogelError, match="unknown measure 'perplexty'; did you mean perplexity"):
        measure(network, measures=["perplexty"])
