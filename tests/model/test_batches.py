"""Parts of calls: which calls can be taken apart, and what their outputs make together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.model.batches import Batches, Part, batch_rows, joined
from aerogel.model.calls import Call
from aerogel.model.placement import Placement
from tests.tiny import FAMILIES


def spans(rows: int, halvings: int) -> list[tuple[int, int]]:
    call = Call((), {"input_ids": torch.zeros(rows, 3, dtype=torch.int64)})
    return [(part.start, part.stop) for part in Batches(Placement(), halvings).parts(0, call)]


def test_parts_are_halves_of_the_parts_before() -> None:
    assert spans(5, 0) == [(0, 5)]
    assert spans(5, 1) == [(0, 3), (3, 5)]
    assert spans(5, 2) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert spans(5, 3) == spans(5, 4) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert spans(1, 4) == [(0, 1)]


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 2), ("mixtral", 2), ("dit", 2), ("unet", 2), ("flux", 2), ("wan", 1), ("qwen2_5_vl", 1), ("llava", 2)]
)
def test_rows_of_calls(name: str, rows: int) -> None:
    """The patches of all images of Qwen2.5-VL stand in one row, and nobody here knows whose they are."""
    call = FAMILIES[name].calls(1)[0]
    assert batch_rows(call) == rows


@pytest.mark.parametrize("name", ["llama", "dit", "flux", "sd3"])
def test_parts_give_together_what_the_whole_gives(name: str) -> None:
    network, call = FAMILIES[name].build(), FAMILIES[name].calls(1)[0]
    parts = list(Batches(Placement(), 1).parts(0, call))
    assert len(parts) == 2
    with torch.no_grad():
        whole, *halves = (network(**one.kwargs) for one in (call, *(part.call(call) for part in parts)))
    torch.testing.assert_close(joined(parts, [half[0] for half in halves]), whole[0])


def test_what_all_samples_share_is_whole() -> None:
    part = Part(0, 1, 3, 4)
    tree = {"hidden": torch.arange(8).reshape(4, 2), "ids": torch.zeros(7, 2), "step": torch.tensor(5), "cached": None}
    taken = part.of(tree)
    assert taken["hidden"].tolist() == [[2, 3], [4, 5]]
    assert taken["ids"] is tree["ids"]
    assert taken["step"] is tree["step"]


def test_outputs_that_do_not_belong_together_are_refused() -> None:
    parts = [Part(0, 0, 2, 4), Part(0, 2, 4, 4)]
    shared = torch.ones(7)
    assert torch.equal(joined(parts, [shared, shared.clone()]), shared)
    with pytest.raises(AerogelError, match=r"a call cannot be taken apart: its parts give \[\(7,\), \(7,\)\]"):
        joined(parts, [shared, shared + 1])


def test_work_is_done_again_until_it_fits() -> None:
    batches, again = Batches(Placement()), []
    call = Call((), {"input_ids": torch.zeros(4, 3, dtype=torch.int64)})

    def work() -> Any:
        sizes = [part.stop - part.start for part in batches.parts(0, call)]
        if max(sizes) > 1:
            raise torch.OutOfMemoryError("no memory\nfor this")
        return sizes

    assert batches.fit(work, lambda: again.append(batches.halvings)) == [1, 1, 1, 1]
    assert again == [1, 2]

    def never() -> None:
        raise torch.OutOfMemoryError("no memory\nfor this")

    with pytest.raises(AerogelError, match=r"cpu has too little memory for one sample at a time \(no memory\); give shorter samples"):
        batches.fit(never)
