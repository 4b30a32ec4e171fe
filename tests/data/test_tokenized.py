"""Tokens given in Python become rows without padding, and a model is calibrated and measured on exactly those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import aerogel
from aerogel.data import given, text, tokenized
from aerogel.data.tokenized import Tokenized
from aerogel.engine.calibration import CalibrationRequest, prepare, reading, shown, with_batch_size
from aerogel.errors import AerogelError
from aerogel.evaluate.perplexity import Perplexity
from aerogel.io.record.schema import Provenance
from aerogel.model.calls import Call
from aerogel.report.page import provenance
from tests.tiny import FAMILIES, opened
from tests.words import tokenizer

ROWS = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
PADDED = {"input_ids": [[5, 6, 7, 0], [0, 8, 9, 10], [11, 0, 0, 0]], "attention_mask": [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]]}


def rows(data: Any) -> list[list[int]]:
    found = given.parse(data)
    assert isinstance(found, Tokenized)
    assert all(row_L.dtype == torch.int64 for row_L in found.rows)
    return [row_L.tolist() for row_L in found.rows]


def _kinds() -> dict[str, Any]:
    ids_NL = torch.tensor(ROWS)
    dicts = [{"input_ids": row, "attention_mask": [1, 1, 1], "labels": row} for row in ROWS]
    return {
        "tensor": ids_NL,
        "int32": ids_NL.int(),
        "numpy": ids_NL.numpy(),
        "uint16": ids_NL.numpy().astype(np.uint16),
        "rows": list(ids_NL),
        "batches": [ids_NL[:2], ids_NL[2:]],
        "lists": ROWS,
        "dict": {"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL)},
        "encoding": BatchEncoding({"input_ids": ROWS, "attention_mask": [[1, 1, 1]] * 4, "token_type_ids": [[0, 0, 0]] * 4}),
        "dicts": dicts,
        "dicts of batches": [{"input_ids": ids_NL[:3]}, {"input_ids": ids_NL[3:], "attention_mask": torch.ones(1, 3, dtype=torch.bool)}],
        "generator": (row for row in dicts),
        "dataset": Dataset.from_list([{"text": "unread", **row} for row in dicts]),
        "formatted": Dataset.from_list(dicts).with_format("torch"),
        "stream": Dataset.from_list(dicts).to_iterable_dataset(),
        "loader": DataLoader(TensorDataset(ids_NL), batch_size=3),
        "loader of dicts": DataLoader(Dataset.from_list(dicts).with_format("torch"), batch_size=3),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_tokens_in_every_form(kind: str) -> None:
    assert rows(_kinds()[kind]) == ROWS


def test_padding_is_left_out_on_either_side() -> None:
    expected = [[5, 6, 7], [8, 9, 10], [11]]
    assert rows(PADDED) == expected
    assert rows({name: torch.tensor(value) for name, value in PADDED.items()}) == expected
    assert rows([{name: value[row] for name, value in PADDED.items()} for row in range(3)]) == expected
    assert rows([{"input_ids": [1, 2], "attention_mask": [0, 0]}, {"input_ids": [3], "attention_mask": [1]}]) == [[3]]


@drawn(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=80, deadline=None)
def test_any_padding_gives_the_rows_that_were_padded(ragged: list[list[int]], left: list[bool]) -> None:
    if not any(ragged):
        return
    length = max(map(len, ragged))
    padded = [[0] * (length - len(row)) + row if side else row + [0] * (length - len(row)) for row, side in zip(ragged, left, strict=False)]
    masks = [
        [0] * (length - len(row)) + [1] * len(row) if side else [1] * len(row) + [0] * (length - len(row))
        for row, side in zip(ragged, left, strict=False)
    ]
    expected = [row for row in ragged if row]
    assert rows({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}) == expected
    found = tokenized.read([{"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}])
    assert sorted(row for batch_NL in found.batches() for row in batch_NL.tolist()) == sorted(expected)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (torch.zeros(2, 3), "batch 0 of the given tokens has token ids of float32; expected tensors"),
        (torch.ones(2, 3, dtype=torch.bool), "token ids of bool"),
        (torch.ones(2, 3, 4, dtype=torch.int64), r"token ids of shape \(2, 3, 4\)"),
        (torch.tensor([[1, -100]]), "has the token id -100; ids are at least 0"),
        ({"input_ids": [["a"]]}, "has token ids that are no numbers"),
        ({"input_ids": None}, "has token ids that are no numbers"),
        ([ROWS[0], ["a"]], "batch 1 of the given tokens has token ids that are no numbers"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "attention_mask with holes"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, "a row of 3 token ids with an attention_mask of 2"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1], [1]]}, "1 rows of token ids and 2 of attention_mask"),
        ({"input_ids": [[1, 2]], "pixel_values": torch.zeros(1, 3)}, "has pixel_values beside input_ids"),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0, 1]]}, "has token_type_ids beside input_ids"),
        ([(torch.tensor([[1]]), torch.tensor([[1]]))], "has 2 tensors without names"),
        (torch.zeros(0, 4, dtype=torch.int64), "no row that is not empty or all padding"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "no row that is not empty or all padding"),
    ],
)
def test_what_is_no_tokens_is_one_line(data: Any, complaint: str) -> None:
    with pytest.raises(AerogelError, match=complaint) as caught:
        given.parse(data)
    assert "\n" not in str(caught.value)


def test_endless_tokens_are_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "MOST_TOKENS", 100)

    def endless() -> Any:
        while True:
            yield {"input_ids": [1, 2, 3]}

    with pytest.warns(UserWarning, match="read up to the first 100"):
        assert len(rows(endless())) == 34


def test_ids_and_lengths_that_the_model_has_not() -> None:
    network = opened("llama")
    size = network.config.vocab_size
    with pytest.raises(AerogelError, match=f"have the id {size}, and the model's vocabulary has {size}; use its own tokenizer"):
        shown(network, torch.tensor([[1, size]]))
    with pytest.raises(AerogelError, match=r"a row of the given tokens has 5000 tokens, and the model \d+ positions"):
        shown(network, torch.ones(1, 5000, dtype=torch.int64))
    some = shown(network, CalibrationRequest(source=ROWS, count=2))
    assert isinstance(some, Tokenized)
    assert [row_L.tolist() for row_L in some.rows] == ROWS[:2]
    with pytest.raises(AerogelError, match="length does not apply to tokens"):
        shown(network, CalibrationRequest(source=ROWS, length=3))


def test_calls_have_rows_of_one_length_and_no_padding() -> None:
    network = opened("llama")
    wanted = shown(network, [*ROWS, [3, 4]])
    assert isinstance(wanted, Tokenized)
    size = reading(network, wanted)
    assert (size.tokens, size.length) == (14, 3)
    made = prepare(network, wanted, 0, head=True)
    assert [call.kwargs["input_ids"].tolist() for call in made.calls] == [ROWS, [[3, 4]]]
    assert [tuple(call.kwargs["input_ids"].shape) for call in prepare(network, with_batch_size(wanted, 3), 0, True).calls] == [
        (3, 3),
        (1, 3),
        (1, 2),
    ]
    assert made.facts == {
        "source": "given data",
        "count": 5,
        "fingerprint": prepare(network, with_batch_size(wanted, 3), 0, True).facts["fingerprint"],
    }
    assert made.facts["fingerprint"] != prepare(network, shown(network, ROWS), 0, True).facts["fingerprint"]
    assert [len(call.kwargs["input_ids"]) for call in prepare(network, with_batch_size(wanted, "auto", 2), 0, True).calls] == [2, 2, 1]


def _inputs(network: Any, samples: Any) -> Tensor:
    """Sum of x x^T over everything that the first linear layer of a model sees, as a Hessian counts it."""
    layer = next(module for module in network.module.modules() if isinstance(module, nn.Linear))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for call in prepare(network, shown(network, samples), 0, head=True).calls:
            network.module(*call.args, **call.kwargs)
    handle.remove()
    x_TI = torch.cat(seen).double()
    return x_TI.T @ x_TI


def test_padding_does_not_count_in_statistics() -> None:
    network = opened("llama")
    alone = sum(_inputs(network, torch.tensor([row])) for row in ([5, 6, 7], [8, 9, 10], [11]))
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(_inputs(network, PADDED), alone)
    unmasked = _inputs(network, {"input_ids": PADDED["input_ids"]})  # what counts where nobody says what is padding
    assert not torch.allclose(unmasked, alone)


def test_padding_of_recorded_calls_is_said() -> None:
    network, inputs = opened("llama"), {name: torch.tensor(value) for name, value in PADDED.items()}
    whole = {**inputs, "attention_mask": torch.ones(3, 4)}
    assert prepare(network, [Call((), inputs), Call((), whole)], 0, head=True).facts["padding"] == 5 / 24
    assert "padding" not in prepare(network, [Call((), whole), Call((inputs["input_ids"],))], 0, head=True).facts
    shown_as = dict(provenance(Provenance(calibration={"source": "given calls", "padding": 5 / 24}), {}))
    assert shown_as["Padding"] == "20.8% of the tokens of calibration calls, counted in statistics like the others"


@pytest.mark.parametrize(
    "form",
    [
        lambda ids_NL: ids_NL,
        lambda ids_NL: [{"input_ids": row} for row in ids_NL.tolist()],
        lambda ids_NL: DataLoader(TensorDataset(ids_NL), 2),
    ],
)
def test_a_model_is_compressed_on_tokens_as_on_its_calls(form: Callable[[Tensor], Any]) -> None:
    ids_NL = torch.randint(3, 112, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = {"steps": [{"gptq": {"scheme": "W4A16_G32"}}]}
    ours, theirs = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    theirs.load_state_dict(ours.state_dict())
    result = aerogel.compress(ours, recipe, samples=form(ids_NL), measures=())
    aerogel.compress(theirs, recipe, samples=text.calls(ids_NL, 4), measures=())
    assert result.facts["provenance"]["calibration"]["count"] == 4
    assert aerogel.plan(theirs_again(), recipe, samples=form(ids_NL)).problems == ()
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def theirs_again() -> nn.Module:
    return FAMILIES["llama"].build()


def test_a_measure_reads_what_is_given() -> None:
    network = opened("llama")
    network.processor = tokenizer()
    documents = ["the people of the world", "war and peace " * 20]
    ids = text.tokens(tokenizer(), documents)
    from_text, from_tokens, from_rows = (
        aerogel.measure(network, measures=["perplexity"], data=data)["original"]["perplexity"]
        for data in (documents, ids[None], [{"input_ids": ids[:7].tolist()}, {"input_ids": ids[7:].tolist()}])
    )
    assert from_text == from_tokens == from_rows
    assert from_text["source"] == "given data"
    assert from_text["tokens"] == len(ids) - 1
    assert Perplexity(source=documents).measure(network) == from_text  # type: ignore[arg-type]
    named = aerogel.measure(network, measures=["perplexity"], data=[{"a": "x", "b": documents[0]}], column="b")
    assert named["original"]["perplexity"]["tokens"] == 5
    with pytest.raises(AerogelError, match="the data would be read by none of the measures"):
        aerogel.measure(network, measures=["size"], data=documents)
    with pytest.raises(AerogelError, match="the model's vocabulary has"):
        aerogel.measure(network, measures=["perplexity"], data=torch.tensor([[1, 10**6]]))
