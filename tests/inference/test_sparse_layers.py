"""Networks whose zeros come in blocks generate the same tokens by the kernels for these, and are what they were afterwards."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from aerogel.inference.generate import Generator
from aerogel.inference.sparse_layers import SparseLayers
from aerogel.kernels import selection
from aerogel.kernels.sparse_linear import Blocks
from aerogel.methods.sparsity.magnitude import Magnitude
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from tests.inference.test_generate import NEW, prompt, theirs
from tests.tiny import opened


@pytest.fixture
def network() -> Network:
    found = opened("llama")
    for block in blocks_of(found):
        Magnitude(0.5, "16x16").compress(block)
    return found


def first(key: object, implementations: object, device: object) -> str:
    """The first kernel, whichever is fastest on tiny shapes."""
    return next(iter(implementations()))  # type: ignore[operator]


@pytest.mark.parametrize("fast_decoder", [True, False])
def test_tokens_are_those_of_the_dense_products(network: Network, fast_decoder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = theirs(network, prompt())
    monkeypatch.setattr(selection, "fastest", first)
    own = Blocks.forward
    with mock.patch.object(Blocks, "forward", autospec=True, side_effect=own) as multiplied:
        generator = Generator(network, 1, 32, fast_decoder=fast_decoder)
        made = generator.generate(prompt(), NEW)
        calls = multiplied.call_count
    assert torch.equal(made.tokens, wanted)
    assert made.path == ("fast_decoder" if fast_decoder else "transformers")
    blocks = len(network.blocks())
    # The prompt, and by the decoder's products four of each block for a token: heads, out, gate and up, down.
    assert calls >= blocks * (7 + 4 * (NEW - 1) if fast_decoder else 7 * NEW)


def test_what_goes_on_comes_off(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "fastest", first)
    layers = SparseLayers(network.module)
    pruned = [layer for block in network.blocks().values() for layer in block.modules() if isinstance(layer, nn.Linear)]
    assert list(layers.layers) == pruned
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), layers.on():  # noqa: PT012 - an error inside is what is tested
        assert all("forward" in vars(layer) for layer in pruned)
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in network.module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())


def test_dense_networks_are_left_alone() -> None:
    assert SparseLayers(opened("llama").module).layers == {}
