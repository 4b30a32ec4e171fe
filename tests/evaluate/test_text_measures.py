"""Perplexity and agreement against a slow, literal computation: one forward for every scored token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.evaluate.decode_perplexity import DecodePerplexity
from aerogel.evaluate.generation import Generation
from aerogel.evaluate.kl_divergence import KlDivergence
from aerogel.evaluate.measure import Measure, positions, slide
from aerogel.evaluate.perplexity import Perplexity
from aerogel.layers.linear import QuantLinear
from aerogel.methods.quantization.rtn import Rtn
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, VOCABULARY
from tests.words import WORDS, tokenizer


@pytest.fixture
def book(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(7)
    words = [WORDS[int(index)] for index in torch.randint(len(WORDS), (68,), generator=generator)]
    path = tmp_path / "book.txt"
    path.write_text(" ".join(words[:30]) + "\f" + " ".join(words[30:]))
    return str(path)


def network(kind: str = "llama", seed: int = 0, bos: bool = False) -> Network:
    return Network(FAMILIES[kind].build(seed), Family("llama", ("llama",)), processor=tokenizer(bos=bos))


def literal(net: Network, ids: list[int], length: int, stride: int, prefix: list[int]) -> list[torch.Tensor]:
    """Log-probabilities over the vocabulary for tokens 1..T-1, each from a forward of exactly the context it may see."""
    body, answers = length - len(prefix), []
    for place in range(1, len(ids)):
        window = 0
        while window + body <= place:
            window += stride
        context = prefix + ids[window:place]
        with torch.no_grad():
            answers.append(net.module(torch.tensor([context])).logits[0, -1].double().log_softmax(-1))
    return answers


@pytest.mark.parametrize(
    ("kind", "bos", "length", "stride", "batch"),
    [
        ("llama", False, 32, 16, 3),
        ("llama", True, 32, 16, 2),
        ("llama", False, 20, 7, 1),
        ("opt", False, 512, 40, 1),
        ("gemma2", True, 24, 24, 4),
    ],
)
def test_perplexity_scores_every_token_once(book: str, kind: str, bos: bool, length: int, stride: int, batch: int) -> None:
    net = network(kind, bos=bos)
    found = Perplexity(source=book, length=length, stride=stride, batch=batch).measure(net)
    ids = Perplexity(source=book).stream(net).tolist()
    length = min(length, 128)  # the tiny networks have 128 positions
    answers = literal(net, ids, length, min(stride, length - 1), [2] if bos else [])
    nats = -sum(float(answer[label]) for answer, label in zip(answers, ids[1:], strict=True)) / len(answers)
    assert found["tokens"] == len(ids) - 1 == 69
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_agreement_is_the_mean_over_the_same_tokens(book: str) -> None:
    ours, theirs = network(seed=0), network(seed=1)
    found = KlDivergence(source=book, length=32, stride=16, batch=2).measure(ours, against=theirs)
    ids = KlDivergence(source=book).stream(ours).tolist()
    p, q = (literal(net, ids, 32, 16, []) for net in (theirs, ours))
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)) / len(p)
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / len(p)
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["top1"] == pytest.approx(same)
    assert kl > 0


def test_a_network_agrees_with_itself(book: str) -> None:
    net = network()
    found = KlDivergence(source=book, length=32, stride=16).measure(net, against=net)
    assert (found["kl"], found["top1"], found["tokens"]) == (0.0, 1.0, 69)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "mixtral", "phi3"])
def test_every_kind_of_language_model_can_be_read(book: str, kind: str) -> None:
    net = network(kind)
    found = Perplexity(source=book, length=512, stride=64).measure(net)
    ids = Perplexity(source=book).stream(net)
    with torch.no_grad():
        logits = net.module(input_ids=ids[None], use_cache=False).logits[0, :-1]
    assert found["nats_per_token"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:])), rel=1e-4)


def test_tokens_limits_what_is_read(book: str) -> None:
    assert Perplexity(source=book, tokens=40, length=32, stride=16).measure(network())["tokens"] == 39


@pytest.mark.parametrize("total", [2, 3, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("length", "stride"), [(16, 1), (16, 8), (16, 15), (32, 5)])
@pytest.mark.parametrize("opening", [[], [99]])
def test_windows_cover_every_token_but_the_first(total: int, length: int, stride: int, opening: list[int]) -> None:
    pieces = list(slide(torch.arange(total), length, stride, opening))
    scored = [int(token) for ids, count in pieces for token in ids[len(ids) - count :]]
    assert scored == list(range(1, total))
    assert all(len(ids) <= length and ids[: len(opening)].tolist() == opening for ids, _ in pieces)
    assert all(count < len(ids) for ids, count in pieces), "a scored token has something before it"


def test_logits_of_all_windows_are_never_held(book: str) -> None:
    net, kept = network(), []
    net.module.lm_head.register_forward_hook(lambda _module, _args, out: kept.append(out.numel()))
    Perplexity(source=book, length=32, stride=16, batch=2).measure(net)
    assert max(kept) <= 2 * 32 * VOCABULARY
    assert kept[-1] < 32 * VOCABULARY, "only the scored end of a window reaches the head"


def test_mistakes_are_named(book: str, tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="has no tokenizer"):
        Perplexity(source=book).measure(Network(FAMILIES["llama"].build(), Family("llama", ("llama",))))
    with pytest.raises(AerogelError, match="kl_divergence compares with the original; give it"):
        KlDivergence(source=book).measure(network())
    with pytest.raises(AerogelError, match="stride 0"):
        Perplexity(source=book, stride=0).measure(network())
    (tmp_path / "one.txt").write_text("the")
    with pytest.raises(AerogelError, match="has 1 tokens and a measure needs at least 2"):
        Perplexity(source=str(tmp_path / "one.txt")).measure(
            Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer(eos=False))
        )


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8"])
def test_holding_float_weights_changes_nothing(book: str, scheme: str) -> None:
    net = network()
    for block in Walk(net, FAMILIES["llama"].calls(1)):
        Rtn(scheme=scheme).compress(block)
    kept, unpacked = (Perplexity(source=book, length=32, stride=16, hold=hold).measure(net)["nats_per_token"] for hold in (True, False))
    assert kept == pytest.approx(unpacked, rel=1e-3)
    assert all(module.dequantized_cache is None for module in net.module.modules() if isinstance(module, QuantLinear))


@pytest.mark.parametrize(("said", "expected"), [(128, 128), (-1, None), (0, None), (None, None), ("x", None)])
def test_a_model_without_a_bound_on_positions_has_none(said: object, expected: int | None) -> None:
    module = FAMILIES["llama"].build()
    module.config.__dict__["max_position_embeddings"] = said
    assert positions(Network(module, Family("llama", ("llama",)))) == expected


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [Perplexity, DecodePerplexity, KlDivergence, Generation])
def test_a_model_whose_logits_are_not_finite_is_not_measured(book: str, kind: type[Measure], broken: float) -> None:
    sound, dead = network(), network()
    dead.module.lm_head.weight[5] = broken  # type: ignore[union-attr, index, operator]
    measure = kind() if kind is Generation else kind(source=book)  # type: ignore[call-arg]
    with pytest.raises(AerogelError, match=rf"^\w+: {type(dead.module).__name__} gives logits that are NaN or infinite"):
        measure.measure(dead, sound if kind.compares else None)
    if kind.compares:
        with pytest.raises(AerogelError, match="gives logits that are NaN"):
            measure.measure(dead, dead)


def test_tokens_that_a_model_rules_out_are_no_fault(book: str) -> None:
    bars = []
    for seed in (0, 1):
        net = network(seed=seed)

        def rule_out(_: torch.nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(-1, torch.tensor([100]), -math.inf)  # which the book does not have

        bars.append(net)
        net.module.lm_head.register_forward_hook(rule_out)  # type: ignore[union-attr, operator]
    assert 100 not in Perplexity(source=book).stream(bars[0]).tolist()
    found = KlDivergence(source=book).measure(bars[1], bars[0])
    assert math.isfinite(found["kl"])
    assert found["kl"] > 0
    assert math.isfinite(Perplexity(source=book).measure(bars[0])["perplexity"])
