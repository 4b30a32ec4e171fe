"""What holds of all that train a router: scores move and nothing else, and the same seed gives the same ones."""

from __future__ import annotations

import pytest
import torch

from aerogel.methods.feature_cache.harmonica import Harmonica
from aerogel.methods.feature_cache.l2c import L2c
from tests.methods.feature_cache import test_harmonica, test_l2c
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded


@pytest.mark.parametrize("router", [Harmonica(**test_harmonica.SHORT), L2c(**test_l2c.SHORT)], ids=lambda router: type(router).__name__)
def test_nothing_but_scores_is_touched(router: Harmonica | L2c) -> None:
    network = dit_pipeline()
    network.module.requires_grad_(True)
    calls, before = recorded(network), {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    state = router.calibrate(network, calls)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.module.parameters())
    torch.manual_seed(7)
    again = router.calibrate(network, calls)
    assert torch.equal(state.scores, again.scores)
    torch.manual_seed(8)
    assert not torch.equal(state.scores, router.calibrate(network, calls).scores)
