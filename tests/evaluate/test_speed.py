"""Speed: what is timed, in which order, and what memory it is charged with."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.evaluate import speed
from aerogel.evaluate.speed import Speed
from aerogel.evaluate.timing import growth_of
from aerogel.inference.generate import Generation
from aerogel.methods.quantization.rtn import Rtn
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened

OPTIONS: dict[str, Any] = {"batch": 2, "prompt": 8, "new_tokens": 4, "rounds": 3}


class ScriptedGenerator:
    """Stands for Generator; each network takes the time its name says, and the machine gets slower by half from turn to turn."""

    turns: list[float] = []  # noqa: RUF012

    def __init__(self, network: Any, batch: int, length: int) -> None:
        assert (batch, length) == (2, 12)
        self.base, self.count = network.base, 0

    def generate(self, tokens_BT: torch.Tensor, new_tokens: int) -> Generation:
        assert (tokens_BT.shape, new_tokens) == ((2, 8), 4)
        self.turns.append(self.base)
        second = self.base * 1.5**self.count
        self.count += 1
        return Generation(tokens_BT, "fast_decoder", None, 10 * second, 11 * second, [second, 7 * second, second])


def test_turns_alternate_and_speedups_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "Generator", ScriptedGenerator)
    ScriptedGenerator.turns = []
    slow, fast = opened("llama"), opened("llama")
    slow.base, fast.base = 0.4, 0.1  # type: ignore[attr-defined]
    found = Speed(**OPTIONS).compare({"slow": slow, "fast": fast})
    assert ScriptedGenerator.turns == [0.4, 0.4, 0.1, 0.1] + [0.4, 0.1] * 3, "two turns each that do not count, then A B A B A B"
    assert found["fast"]["decode_speedup"] == pytest.approx(4)
    assert found["fast"]["prefill_speedup"] == pytest.approx(4)
    assert found["fast"]["first_token_speedup"] == pytest.approx(4)
    assert found["fast"]["first_token_seconds"] == pytest.approx(1.1 * found["fast"]["prefill_seconds"])
    assert found["slow"]["decode_speedup"] == 1
    # The median turn is the second that counts: the step is base * 1.5**2, two rows a step, 16 tokens a prompt.
    assert found["fast"]["decode_milliseconds"] == pytest.approx(225)
    assert found["fast"]["decode_tokens_per_second"] == pytest.approx(2 / 0.225)
    assert found["fast"]["prefill_tokens_per_second"] == pytest.approx(16 / 2.25)


def test_facts_are_complete_and_threads_come_back() -> None:
    before = torch.get_num_threads()
    network = opened("llama")
    found = Speed(**OPTIONS, threads=1).measure(network, against=opened("llama"))
    assert torch.get_num_threads() == before
    assert {name: found[name] for name in ("batch", "prompt", "new_tokens", "rounds", "threads", "device", "path", "reason")} == {
        **OPTIONS, "threads": 1, "device": "cpu", "path": "fast_decoder", "reason": None,
    }  # fmt: skip
    # The clock of the tests moves by a second at each reading: a prompt of 16 tokens takes one, its first token one more, each step one.
    assert {name: found[name] for name in found if "second" in name or "speedup" in name} == {
        "prefill_tokens_per_second": 16.0, "decode_tokens_per_second": 2.0, "prefill_seconds": 1.0, "decode_milliseconds": 1000.0,
        "prefill_speedup": 1.0, "decode_speedup": 1.0, "first_token_seconds": 2.0, "first_token_speedup": 1.0,
    }  # fmt: skip
    assert found["peak_memory_bytes"] >= sum(tensor.nbytes for tensor in network.module.parameters())


def test_growth_counts_what_is_freed_again() -> None:
    with growth_of(torch.device("cpu")) as growth:
        torch.ones(2**28 // 4).add_(1)
    assert 2**28 <= growth[0] < 2**28 + 2**12


@pytest.mark.parametrize("quantized", [False, True])
def test_peak_memory_does_not_depend_on_what_ran_before(quantized: bool) -> None:
    network = opened("llama")
    if quantized:
        for block in Walk(network, FAMILIES["llama"].calls(1)):
            Rtn(scheme="W8A8").compress(block)
    first = Speed(**OPTIONS).measure(network)["peak_memory_bytes"]
    freed = [torch.ones(2**20) for _ in range(16)]
    del freed
    both = Speed(**OPTIONS).compare({"again": network, "beside": network})
    assert first == both["again"]["peak_memory_bytes"] == both["beside"]["peak_memory_bytes"]
    weights = {id(tensor): tensor for tensor in (*network.module.parameters(), *network.module.buffers())}
    assert first > sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 126, "new_tokens": 3}, "network has 128 positions; a prompt of 126 and 3 new tokens do not fit"),
        ({"new_tokens": 1}, "at least 1, 1, 1 and 2 are expected"),
    ],
)
def test_what_cannot_be_timed_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(AerogelError, match=re.escape(message)):
        Speed(**OPTIONS | options).measure(opened("llama"))
