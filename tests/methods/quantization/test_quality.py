"""What GPTQ, AWQ and W8A8 keep of a real language model, by held-out text; few tokens, so that it takes minutes on one core.

benchmarks/quality.py measures the same with 128 sequences; there the differences are larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import cross_entropy

import aerogel
from aerogel.data.text import calls, samples
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.base import BlockMethod
from aerogel.methods.quantization.awq import Awq
from aerogel.methods.quantization.gptq import Gptq
from aerogel.methods.quantization.rtn import Rtn
from aerogel.methods.quantization.smoothquant import Smoothquant
from aerogel.model.network import Network
from aerogel.model.walk import Walk

pytestmark = [pytest.mark.quality, pytest.mark.slow]

CALIBRATION, HELD_OUT = 8, 4
"""Sequences of 512 tokens."""


def nats(methods: Sequence[BlockMethod] = ()) -> float:
    """Mean negative log-likelihood of a held-out token after these methods."""
    network: Network = aerogel.load("smollm2-135m", dtype=torch.float32, lazy=False)
    if methods:
        for block in Walk(network, calls(samples(network.processor, "sotu", CALIBRATION, 512), batch=4)):
            for method in methods:
                method.compress(block)
    losses = []
    with torch.no_grad(), cache_dequantized(network.module):
        for tokens in samples(network.processor, "sotu-held-out", HELD_OUT, 512):
            logits = network.module(tokens[None]).logits[0]
            losses.append(cross_entropy(logits[:-1], tokens[1:]))
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def original() -> float:
    return nats()


@pytest.fixture(scope="module")
def rounded(original: float) -> float:
    """What rounding to three bits loses."""
    return nats([Rtn("W3A16_G64")]) - original


def test_gptq_loses_far_less_than_rounding(original: float, rounded: float) -> None:
    assert nats([Gptq("W3A16_G64")]) - original <= 0.4 * rounded


def test_awq_loses_less_than_rounding(original: float, rounded: float) -> None:
    assert nats([Awq("W3A16_G64")]) - original <= 0.85 * rounded


def test_eight_bits_cost_at_most_one_per_cent_of_perplexity(original: float) -> None:
    smooth = [Smoothquant(alpha="search", include_linear_sources=True), Rtn("W8A8")]
    assert nats(smooth) - original <= 0.01
