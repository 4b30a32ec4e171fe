"""Random blocks: the seed decides, budgets hold, and stages agree; they lose more than blocks chosen by attention."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aerogel.data import text
from aerogel.engine.opening import open_model
from aerogel.evaluate.measure import tokenizer_of
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.methods.prompt_tokens.random_blocks import RandomBlocks
from aerogel.runtime.tokens.stage import Stage
from tests.methods.prompt_tokens.prompts import LENGTH, Recorder, deep, prompt
from tests.runtime.tokens.dropping import hidden_by_masks

MATRIX = {"options": {"min_length": 1, "sink": 1, "local": 3, "block": 2, "layers": [1], "keep": [0.8]}}


@pytest.mark.parametrize("pads", [0, 7])
def test_the_seed_decides_and_what_is_computed_equals_masks(pads: int) -> None:
    network = deep()
    call = prompt(2, pads=pads)
    gone = []
    for seed in (0, 0, 1):
        recorder = Recorder(RandomBlocks(keep=(0.6, 0.3), layers=(2, 4), min_length=64, sink=3, local=8, block=8, seed=seed))
        with recorder.on(network):
            ours_BNV = network.run(call).logits
        gone_BN = recorder.gone[2] | recorder.gone[4]
        left_B = LENGTH - torch.tensor([0, pads]) - gone_BN.sum(1)
        allowed_B = (0.3 * (LENGTH - torch.tensor([0, pads]))).round()
        assert ((left_B <= allowed_B) & (left_B > allowed_B - 8)).all()
        gone.append(gone_BN)
    assert torch.equal(gone[0], gone[1])
    assert not torch.equal(gone[0], gone[2])
    read_BN = ~gone_BN & call.kwargs["attention_mask"].bool()
    theirs_BNV = hidden_by_masks(network, call, recorder.gone)
    torch.testing.assert_close(ours_BNV[read_BN], theirs_BNV[read_BN], rtol=0, atol=1e-5)


@dataclass(frozen=True)
class _Lowest(PromptPruning):
    """Keeps what the end attends to least."""

    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        return -super().scores(stage, place_BK, blocks)


@pytest.mark.quality
@pytest.mark.slow
def test_attention_loses_less_than_chance_and_chance_less_than_the_lowest_scores() -> None:
    """KL divergence of the last tokens of book text where half of it goes before the seventh of thirty blocks."""
    network = open_model("smollm2-135m", lazy=False, dtype=torch.float32)
    calls = text.calls(text.samples(tokenizer_of(network), "moby-dick", 6, 256, seed=4), batch=1)
    options = {"keep": (0.5,), "layers": (6,), "min_length": 128, "block": 16, "sink": 4, "local": 32}
    attention, lowest = (cls(sub_block=16, **options) for cls in (PromptPruning, _Lowest))
    kl = [policy.calibrate(network, calls).kl for policy in (attention, RandomBlocks(**options), lowest)]
    assert kl[0] < kl[1] < kl[2], kl
