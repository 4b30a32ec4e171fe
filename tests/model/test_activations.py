"""Outputs come back as they were put, in memory and from disk, and keep their shape when they fade."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aerogel.model.activations import Activations


@pytest.fixture(params=["memory", "disk"])
def activations(request: pytest.FixtureRequest, tmp_path: Path) -> Activations:
    return Activations(tmp_path if request.param == "disk" else None)


def output() -> tuple[torch.Tensor, None, dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(3, 4, generator=generator).bfloat16()
    return shared, None, {"transposed": shared.T, "pair": [torch.tensor(7), 0.5], "flag": True}


def test_round_trip(activations: Activations) -> None:
    activations.put("block.0", 2, output())
    first, nothing, rest = activations.get("block.0", 2)
    expected = output()
    assert first.dtype is torch.bfloat16
    assert torch.equal(first, expected[0])
    assert nothing is None
    assert torch.equal(rest["transposed"], expected[2]["transposed"])
    assert rest["pair"][0].item() == 7
    assert rest["pair"][1] == 0.5
    assert rest["flag"] is True


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
def test_the_order_in_memory_comes_back(activations: Activations, order: tuple[int, ...]) -> None:
    tensor = torch.randn(2, 3, 4, 5).permute(order)
    activations.put("block.0", 0, [tensor])
    (back,) = activations.get("block.0", 0)
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_changing_what_came_back_changes_nothing_kept(activations: Activations) -> None:
    activations.put("block.0", 0, torch.ones(3))
    activations.get("block.0", 0).zero_()
    assert torch.equal(activations.get("block.0", 0), torch.ones(3))


def test_a_faded_output_answers_with_zeros_of_its_shape(activations: Activations) -> None:
    activations.put("block.0", 0, (torch.ones(2, 3, dtype=torch.float16), None))
    activations.fade("block.0", 4)
    activations.fade("block.0", 4)
    faded, nothing = activations.get("block.0", 0)
    assert nothing is None
    assert faded.dtype is torch.float16
    assert torch.equal(faded, torch.zeros(2, 3, dtype=torch.float16))


def test_faded_outputs_share_zeros_until_somebody_writes_to_them(activations: Activations) -> None:
    for block in ("block.0", "block.1"):
        activations.put(block, 0, torch.ones(2, 3))
        activations.fade(block, 1)
    first, second = activations.get("block.0", 0), activations.get("block.1", 0)
    assert first is second
    first[0].add_(1)  # a view of it
    assert torch.equal(activations.get("block.0", 0), torch.zeros(2, 3))


def test_in_inference_mode_faded_outputs_share_nothing(activations: Activations) -> None:
    activations.put("block.0", 0, torch.ones(2, 3))
    activations.fade("block.0", 1)
    with torch.inference_mode():
        activations.get("block.0", 0).add_(1)
        assert not activations.get("block.0", 0).any()


def test_an_output_that_is_put_again_is_faded_no_longer(activations: Activations) -> None:
    activations.put("block.0", 0, torch.ones(2))
    activations.fade("block.0", 1)
    assert not activations.get("block.0", 0).any()
    activations.put("block.0", 0, torch.ones(2))
    assert activations.get("block.0", 0).all()


def test_an_output_that_never_was_is_a_key_error(activations: Activations) -> None:
    with pytest.raises(KeyError):
        activations.get("block.0", 0)


def test_disk_outlasts_the_object(tmp_path: Path) -> None:
    Activations(tmp_path).put("block.0", 0, torch.arange(4))
    assert torch.equal(Activations(tmp_path).get("block.0", 0), torch.arange(4))
