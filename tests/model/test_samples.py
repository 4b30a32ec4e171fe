"""Samples of several calls stand in one batch where they can, and come as they are where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.samples import Samples


def tokens(count: int, length: int, value: float) -> Tensor:
    return torch.full((count, length, 2), value)


def test_samples_mix_calls() -> None:
    many = [Call((tokens(n, 4, n), None), {"place": torch.arange(4)[None]}) for n in (2, 3)]
    samples = Samples(many, [tokens(n, 4, -n) for n in (2, 3)])
    assert len(samples) == 5
    ((call, wanted, share),) = samples.take([4, 0])
    assert call.args[0][:, 0, 0].tolist() == [3, 2]
    assert call.args[1] is None
    assert call.kwargs["place"].tolist() == [[0, 1, 2, 3]]
    assert wanted[:, 0, 0].tolist() == [-3, -2]
    assert share == 1
    assert samples.power == pytest.approx((8 + 18) / 2)


@pytest.mark.parametrize(
    "other",
    [
        Call((tokens(2, 5, 1.0), True), {"place": torch.arange(4)}),
        Call((tokens(2, 4, 1.0), False), {"place": torch.arange(4)}),
        Call((tokens(2, 4, 1.0), True), {"place": torch.arange(4) + 1}),
        Call((tokens(2, 4, 1.0), True), {}),
    ],
    ids=["length", "switch", "shared", "structure"],
)
def test_calls_that_do_not_mix_come_apart(other: Call) -> None:
    first = Call((tokens(3, 4, 0.0), True), {"place": torch.arange(4)})
    samples = Samples([first, other, first], [call.args[0] for call in (first, other, first)])
    groups = list(samples.take([0, 3, 6, 5]))
    assert [share for *_, share in groups] == [0.75, 0.25] or [share for *_, share in groups] == [0.5, 0.5]
    assert sum(len(wanted) for _, wanted, _ in groups) == 4
    for call, wanted, _ in groups:
        assert torch.equal(call.args[0], wanted)


def test_rows_of_tokens_without_a_batch_stay_whole() -> None:
    calls = [Call((torch.randn(9, 4),), {"bounds": torch.tensor([0, 4, 9])}) for _ in range(2)]
    samples = Samples(calls, [call.args[0] + 1 for call in calls])
    assert len(samples) == 2
    groups = list(samples.take([1, 0]))
    assert len(groups) == 2
    assert {id(call.args[0]) for call, *_ in groups} == {id(call.args[0]) for call in calls}


def test_no_call_is_an_error() -> None:
    with pytest.raises(AerogelError, match="no call reached"):
        Samples([], [])
