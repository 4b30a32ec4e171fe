"""Edges and residual streams of every architecture hold in float64: all edges folded at once, and the stream rotated, change no answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.engine.opening import open_model
from aerogel.methods.quantization.rotate import Rotate
from aerogel.model.calls import Call
from aerogel.model.edges import fold
from aerogel.model.network import Network
from aerogel.model.structure.observer import Observer, double_by_default
from tests.architectures.cases import NOT_BUILT, SAMPLE, cases, output
from tests.architectures.through import difference

NOT_IN_FLOAT64 = {"image-text-muse_spark"}
"""Types that answer by a product of groups, which torch has in 32 bits and less only."""
CASES = {str(case): case for case in cases() if str(case) not in NOT_BUILT.keys() | NOT_IN_FLOAT64}
EXACT = 1e-6


def exact(network: Network, calls: list[Call]) -> list[Tensor]:
    """Answers in float64, whatever the code of the model asks for."""
    with torch.no_grad(), double_by_default(), Observer({}):
        return [output(network.module, call.map(lambda x: x.double() if x.is_floating_point() else x)).double() for call in calls]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CASES])
def test_nothing_changes(name: str) -> None:
    module = CASES[name].make()
    calls = CASES[name].calls(module)
    network = open_model(module)
    network.discover(calls)
    found, stream = network.edges, network.residual
    module.double()
    before = exact(network, calls)
    generator = torch.Generator().manual_seed(0)
    for block, edges in found.items():
        for edge in edges.edges:
            scale_C = 0.5 + 1.5 * torch.rand(len(edge.rows_C), generator=generator, dtype=torch.float64)
            fold(module.get_submodule(block), edge, scale_C)
    assert difference(exact(network, calls), before) < EXACT
    if not isinstance(stream, str):
        Rotate(kind="random").apply(network, [])
        assert difference(exact(network, calls), before) < EXACT
