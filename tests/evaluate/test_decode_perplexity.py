"""Perplexity by decoding: that of the same windows where nothing is quantized, and what quantized caches cost a trained model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from aerogel.engine.opening import open_model
from aerogel.engine.scores import _usual as usual
from aerogel.errors import AerogelError
from aerogel.evaluate.decode_perplexity import DecodePerplexity
from aerogel.evaluate.perplexity import Perplexity
from aerogel.methods.kv_cache.kivi import Kivi
from aerogel.methods.kv_cache.kv_cache_fp8 import KVCacheFP8
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_cache.policy import KVCachePolicy
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests.tiny import FAMILIES
from tests.words import WORDS, tokenizer


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(WORDS[int(index)] for index in torch.randint(len(WORDS), (68,), generator=torch.Generator().manual_seed(7))))
    return str(path)


def network(kind: str, bos: bool = False) -> Network:
    return Network(FAMILIES[kind].build(), Family(kind, (kind,)), processor=tokenizer(bos=bos))


@pytest.mark.parametrize(("kind", "bos"), [("llama", False), ("mistral", True), ("gemma2", True), ("gpt_oss", False)])
def test_an_unquantized_cache_gives_the_perplexity_of_the_windows(book: str, kind: str, bos: bool) -> None:
    net, options = network(kind, bos), {"source": book, "length": 32, "stride": 16, "batch": 3}
    found, expected = DecodePerplexity(**options).measure(net), Perplexity(**options).measure(net)
    assert found["tokens"] == expected["tokens"]
    assert found["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))


def test_bytes_are_those_of_all_layers(book: str) -> None:
    net = network("llama")
    plain = DecodePerplexity(source=book, length=32, stride=16).measure(net)
    assert plain["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, float32
    policy = KVCacheInt(bits=4)
    with policy.on(net, policy.calibrate(net, [Call((), {"input_ids": torch.arange(12)[None]})])):
        quantized = DecodePerplexity(source=book, length=32, stride=16).measure(net)
    assert quantized["cache_bytes_per_token"] == 2 * 2 * 2 * (16 / 2 + 4)
    assert quantized["perplexity"] != plain["perplexity"]


def test_it_is_taken_unasked_where_a_policy_quantizes_the_cache() -> None:
    net, policy = network("llama"), KVCacheInt()
    assert "decode_perplexity" not in usual(net)
    with policy.on(net, policy.calibrate(net, [Call((), {"input_ids": torch.arange(12)[None]})])):
        assert "decode_perplexity" in usual(net)


def test_a_model_without_a_cache_is_refused(book: str) -> None:
    net = network("llama")
    net.module.forward = lambda input_ids, **_: type("Answer", (), {"logits": torch.zeros(*input_ids.shape, 128)})()  # type: ignore[method-assign]
    with pytest.raises(AerogelError, match="gives back no key-value cache"):
        DecodePerplexity(source=book).measure(net)


@pytest.mark.slow
@pytest.mark.quality
def test_eight_bits_cost_little_and_four_more() -> None:
    """SmolLM2, decoded: 8 bits within half a percent, 4 bits of a whole head further away, KIVI in groups of 32 nearer than that."""
    net = open_model("smollm2-135m", lazy=False)
    measure = DecodePerplexity(tokens=384, length=128, stride=64, batch=8)
    calls = [Call((), {"input_ids": measure.stream(net)[None, :256]})]

    def decoded(policy: KVCachePolicy) -> float:
        with policy.on(net, policy.calibrate(net, calls)):
            return float(measure.measure(net)["perplexity"])

    plain = float(measure.measure(net)["perplexity"])
    eight, float8, four = decoded(KVCacheInt(bits=8)), decoded(KVCacheFP8()), decoded(KVCacheInt(bits=4))
    kivi, two = decoded(Kivi(bits=4, residual=32)), decoded(Kivi(bits=2, residual=32))
    assert eight == pytest.approx(plain, rel=0.005)
    assert float8 == pytest.approx(plain, rel=0.02)
    assert plain < kivi < four
    assert kivi < two
