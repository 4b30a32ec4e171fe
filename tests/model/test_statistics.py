"""Statistics of inputs: the sums of all calls, shared where linears share an input, without running more than is needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.statistics import InputStatistics, collect, sharing


class Gated(nn.Module):
    """Two linears read x, one reads another tensor, one only runs when the call says so, and something expensive comes last."""

    def __init__(self, width: int = 300) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 6), nn.Linear(width, 6)
        self.down, self.sometimes, self.idle = nn.Linear(6, 4), nn.Linear(width, 6), nn.Linear(width, 2)
        self.tails = 0

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        both = self.left(x) * self.right(x)
        if extra:
            both = both + self.sometimes(x)
        y = self.down(both)
        self.tails += 1
        return y


def block(calls: list[Call], width: int = 300) -> Block:
    torch.manual_seed(0)
    module = Gated(width)
    return Block("cell", module, 0, 1, calls, Network(module, Family("f", ("f",))))  # type: ignore[arg-type]


def inputs(count: int = 3, width: int = 300) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5 + i, width, generator=generator) * (1 + i) for i in range(count)]


def test_sums_are_those_of_all_calls_together() -> None:
    xs = inputs()
    found = collect(block([Call((x,)) for x in xs]), ["left", "right", "down"], moment=True, ranges=True)
    x_TI = torch.cat([x.reshape(-1, 300) for x in xs]).double()
    seen = found["left"]
    assert seen is found["right"]
    assert seen is not found["down"]
    assert list(found) == ["left", "right", "down"]
    assert seen.tokens == len(x_TI)
    torch.testing.assert_close(seen.moment().double(), x_TI.T @ x_TI / len(x_TI), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.mean_magnitude().double(), x_TI.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.absmax().double(), x_TI.abs().amax(0))
    assert seen.extremes == [(x.min().item(), x.max().item()) for x in xs]
    assert found["down"].moment().shape == (6, 6)


def test_second_moments_of_bfloat16_inputs_are_as_exact_as_those_of_float32() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    seen = InputStatistics(300, torch.device("cpu"), moment=True)
    xs = [x.bfloat16() for x in inputs()]
    for x in xs:
        seen.update(x)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    x_TI = torch.cat([x.reshape(-1, 300) for x in xs]).double()
    torch.testing.assert_close(seen.moment().double(), x_TI.T @ x_TI / len(x_TI), rtol=1e-5, atol=1e-5)


def test_forwards_stop_at_the_last_input_that_is_needed() -> None:
    here = block([Call((x,)) for x in inputs(4)])
    collect(here, ["left", "down"], ranges=True)
    assert here.module.tails == 1  # the first call runs through, since nobody knows yet what comes


def test_linears_that_meet_in_some_calls_only_are_summed_apart() -> None:
    xs = inputs(3)
    here = block([Call((x,), {"extra": i == 1}) for i, x in enumerate(xs)])
    found = collect(here, ["left", "sometimes", "down"], moment=True, ranges=True)
    x_TI = torch.cat([x.reshape(-1, 300) for x in xs])
    torch.testing.assert_close(found["left"].moment(), x_TI.T @ x_TI / len(x_TI), rtol=1e-4, atol=1e-4)
    middle = xs[1].reshape(-1, 300)
    torch.testing.assert_close(found["sometimes"].moment(), middle.T @ middle / len(middle), rtol=1e-4, atol=1e-4)
    assert found["sometimes"].tokens == len(middle)
    torch.testing.assert_close(found["left"].absmax(), x_TI.abs().amax(0))


def test_a_linear_that_no_token_reached_is_left_out() -> None:
    x = inputs(1)[0]
    found = collect(block([Call((x,)), Call((x[:, :0],))]), ["left", "idle"], ranges=True, rows=4)
    assert list(found) == ["left"]
    assert found["left"].tokens == 10


def test_a_sample_has_rows_of_every_call() -> None:
    xs = inputs(3)
    rows = collect(block([Call((x,)) for x in xs]), ["left"], rows=9)["left"].sample()
    assert rows.shape == (9, 300)
    for i, x in enumerate(xs):
        x_TI = x.reshape(-1, 300)
        assert torch.equal(rows[3 * i], x_TI[0])
        assert torch.equal(rows[3 * i + 2], x_TI[-1])


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = inputs(1)[0]
    x[0, 0, 0] = torch.nan
    with pytest.raises(AerogelError, match=r"^cell\.left: its inputs are not finite \(largest magnitude nan\)"):
        collect(block([Call((x,))]), ["left"], moment=True)["left"].moment()


def test_sharing_is_seen_in_one_call() -> None:
    here = block([Call((inputs(1)[0],)) for _ in range(3)])
    assert sharing(here, ["down", "idle", "right", "left"]) == [("left", "right"), ("down",)]
    assert here.module.tails == 1


def test_sharing_is_seen_in_one_sample_unless_that_misses_a_layer() -> None:
    x = inputs(1)[0]
    here = block([Call((x,)), Call((x,))])
    here.one_row_each = [Call((x[:1],)), Call((x[:1],))]  # type: ignore[assignment]
    rows: list[int] = []
    here.module.left.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert sharing(here, ["left", "right", "down"]) == [("left", "right"), ("down",)]
    assert rows == [1]
    assert sharing(here, ["left", "right", "down", "idle"]) == [("left", "right"), ("down",)]
    assert rows == [1, 1, 2]


def test_calls_of_different_shapes_that_share_differently_share_nothing() -> None:
    x = inputs(1)[0]
    alike = block([Call((x,)), Call((x, False))])
    assert sharing(alike, ["left", "right", "sometimes"]) == [("left", "right")]
    apart = block([Call((x,)), Call((x, True))])
    assert sharing(apart, ["left", "right", "sometimes"]) == []
