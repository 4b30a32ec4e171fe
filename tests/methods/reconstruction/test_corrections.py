"""Corrections in closed form: biases give the mean output of the original model, weights get back their spread."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aerogel.engine.opening import open_model
from aerogel.layers.conv import matrix
from aerogel.methods.reconstruction.bias_correction import channel_mean
from aerogel.methods.reconstruction.weight_correction import gain_and_shift
from aerogel.model.block import Block
from aerogel.model.units import captured
from tests.methods.reconstruction.pruned import images, tiny_cnn, visit, zeros
from tests.tiny import FAMILIES, opened


@pytest.mark.parametrize("name", ["opt", "dit"])
def test_corrected_biases_remove_the_error_of_the_mean(name: str) -> None:
    """Of every pruned layer with a bias, linear or convolution, in the model as it is afterwards; layers without one are left."""
    network, calls = opened(name), FAMILIES[name].calls(2)
    errors: dict[str, list[float]] = {"before": [], "after": []}

    def see(block: Block, when: str) -> None:
        assert block.original is not None
        for part, layer in block.linears(("Linear", "Conv2d"), ("lm_head",)).items():
            if block.full_name(part) in network.pruned and layer.bias is not None:
                sparse, dense = (channel_mean(captured(of, None, of.module.get_submodule(part))[1]) for of in (block, block.original))
                errors[when].append(float((sparse - dense).norm() / dense.norm()))

    notes = visit(network, calls, [{"bias_correction": {}}], share=0.7, see=see)
    assert len(errors["after"]) == len([note for note in notes if "bias_shift" in note]) > 5
    assert max(errors["after"]) < 1e-4
    assert min(errors["before"]) > 1e-2


def test_a_bias_is_the_literal_formula() -> None:
    """Mean output of the original minus the pruned weight times the mean input."""
    network, calls = open_model(tiny_cnn()), images(2)
    head = copy.deepcopy(network.module.get_submodule("head"))
    seen: dict[str, Tensor] = {}

    def see(block: Block, when: str) -> None:
        if block.name == "" and when == "after":
            assert block.original is not None
            seen["sparse"] = torch.cat(captured(block, block.module.get_submodule("head"))[0]).mean(0)
            seen["dense"] = torch.cat(captured(block.original, block.original.module.get_submodule("head"))[0]).mean(0)

    visit(network, calls, [{"bias_correction": {}}], see=see)
    layer = network.module.get_submodule("head")
    assert isinstance(layer, nn.Linear)
    assert isinstance(head, nn.Linear)
    expected = head(seen["dense"]) - layer.weight @ seen["sparse"]
    assert torch.allclose(layer.bias, expected, atol=1e-5)


def test_gain_and_shift_are_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    dense_OI = torch.randn(5, 30, generator=generator) + 0.3
    kept_OI = torch.rand(5, 30, generator=generator) < 0.4
    gain_O, shift_O = gain_and_shift(dense_OI, dense_OI * kept_OI, kept_OI)
    for row in range(5):
        dense, pruned = dense_OI[row].numpy(), (dense_OI * kept_OI)[row].numpy()
        assert float(gain_O[row]) == pytest.approx(float(dense.std() / pruned.std()), rel=1e-5)
        assert float(shift_O[row]) == pytest.approx(float(dense.mean() - dense.std() / pruned.std() * pruned.mean()), rel=1e-4)


def test_rows_without_weights_are_left() -> None:
    gain_O, _ = gain_and_shift(torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool))
    assert torch.equal(gain_O, torch.ones(2))


def test_weights_are_corrected_and_zeros_stay() -> None:
    network, calls = open_model(tiny_cnn()), images(1)
    dense = copy.deepcopy(network.module)
    before: dict[str, tuple[Tensor, Tensor]] = {}

    def see(block: Block, when: str) -> None:
        if when == "before":
            for name in network.pruned - before.keys():
                weight_OI = matrix(network.module.get_submodule(name)).clone()  # type: ignore[arg-type]
                before[name] = (weight_OI, weight_OI != 0)

    notes = visit(network, calls, [{"weight_correction": {}}], see=see)
    assert {note["name"] for note in notes} == network.pruned
    assert all(note["gain"] > 1 for note in notes)
    for name, zero_OI in zeros(network).items():
        weight_OI, kept_OI = before[name]
        assert torch.equal(zero_OI, ~kept_OI)
        gain_O, shift_O = gain_and_shift(matrix(dense.get_submodule(name)), weight_OI, kept_OI)  # type: ignore[arg-type]
        after_OI = matrix(network.module.get_submodule(name))  # type: ignore[arg-type]
        assert torch.allclose(after_OI, (weight_OI * gain_O[:, None] + shift_O[:, None]) * kept_OI, atol=1e-6)
