"""Networks that inputs made up from their configuration do not run are discovered with what they are calibrated on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine.calibration import shown
from aerogel.engine.opening import open_model
from aerogel.model import network as networks
from tests.architectures.cases import cases
from tests.runtime.feature_cache.test_replay import dit_pipeline

WANTED = Denoising(count=2, steps=3, batch=2)


@pytest.fixture
def _nothing_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "examples_of", lambda module: [])


@pytest.mark.usefixtures("_nothing_made_up")
def test_a_pipeline_is_discovered_by_its_own_first_call() -> None:
    network = dit_pipeline()
    assert not any(edges.edges for edges in network.edges.values())
    shown(network, WANTED)
    assert all(edges.edges for edges in network.edges.values())
    assert network.time is not None


@pytest.mark.usefixtures("_nothing_made_up")
def test_so_a_recipe_that_needs_edges_is_not_refused() -> None:
    recipe: dict[str, Any] = {"steps": [{"smoothquant": {}}, {"rtn": {"scheme": "W8A8"}}]}
    result = aerogel.compress(dit_pipeline().processor, recipe, samples=WANTED, measures=())
    assert [line for line in result.journal if line["method"] == "smoothquant"]


def test_calls_in_half_precision_are_as_good() -> None:
    (case,) = (case for case in cases() if case.name == "QwenImageTransformer2DModel")
    module = case.make().to(torch.bfloat16)
    calls = [call.map(lambda tensor: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor) for call in case.calls(module)]
    network = open_model(module)
    assert network.needs_example
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown(network, calls)
    assert not network.needs_example
    assert all(edges.edges for edges in network.edges.values())
