"""PyramidDrop: counts after each stage, and its scores are those of the block that follows."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.tokens.pyramid_drop import PyramidDrop
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Shortening
from tests.tiny import FAMILIES, opened

MATRIX = {"options": {"layers": [0, 1], "keep": [0.5, 0.25]}}


def test_published_stages_of_a_decoder_of_32_blocks() -> None:
    assert sorted(PyramidDrop().rules(32)) == [8, 16, 24]


@pytest.mark.parametrize(("keep", "counts"), [((0.5, 0.25), (2, 1)), ((3, 2), (3, 2)), ((1.0, 0.5), (4, 2))])
def test_so_many_tokens_stay_after_each_stage(keep: tuple[float, ...], counts: tuple[int, ...]) -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    text = call.kwargs["input_ids"].shape[1] - 4
    method = PyramidDrop(keep=keep, layers=(0, 1))
    with Shortening(network, decoder_of(network), method.rules(2)).on() as shortening:
        network.run(call)
    assert shortening.lengths == tuple(text + count for count in counts)


def test_the_probe_sees_what_the_block_attends_with() -> None:
    """Queries and keys read before a block are those that its attention gets afterwards, bit for bit where nothing is dropped."""
    network = opened("qwen2_5_vl")
    call = FAMILIES["qwen2_5_vl"].calls(2)[1]
    probed, watched = [], []

    def look(stage: object) -> None:
        probed.append(stage.probe())  # type: ignore[attr-defined]

    def after(stage: object) -> None:
        watched.append(stage.watched[0])  # type: ignore[attr-defined]

    with Shortening(network, decoder_of(network), {0: look, 1: after}, (0,)).on():
        network.run(call)
    asking = torch.tensor([[3], [5]])
    assert torch.equal(probed[0].attention(asking), watched[0].attention(asking))


def test_budgets_and_stages_are_as_many() -> None:
    problems = list(PyramidDrop(keep=(0.5,)).problems(opened("llava"), None))  # type: ignore[arg-type]
    assert problems[0] == "keep has 1 budgets for 3 stages; give one for each"
