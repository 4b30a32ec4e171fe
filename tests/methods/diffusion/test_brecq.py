"""BRECQ: its loss by hand, learned rounding against the nearest, targets of the float network, isolation of what is done already."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.conv import QuantConv2d, matrix
from aerogel.layers.linear import QuantLinear
from aerogel.layers.split import Split
from aerogel.methods.diffusion import brecq
from aerogel.methods.diffusion.brecq import Brecq
from aerogel.methods.diffusion.tiar import Tiar
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.samples import Samples, reconstruction_error
from tests.methods.diffusion.test_fsc import calls
from tests.tiny import FAMILIES, opened, output

W4 = "W4A16_CHANNEL_ASYM"


def compressed(module: nn.Module, *steps: dict[str, Any], samples: list[Call] | None = None, **options: Any) -> Network:
    return aerogel.compress(module, {"steps": list(steps)}, samples=samples or calls(), measures=(), **options).network


def image_error(network: Network) -> float:
    plain = opened("unet")
    pairs = [(output(network.module, call), output(plain.module, call)) for call in calls()]
    return sum(float((a - b).square().mean()) for a, b in pairs)


def test_the_loss_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    a, b = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    total = sum(float((x - y) ** 2) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    assert float(reconstruction_error(a, b)) == pytest.approx(total / (3 * 2 * 2), rel=1e-5)
    tokens, others = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    total = float((tokens - others).square().sum())
    assert float(reconstruction_error((tokens, None), (others, None))) == pytest.approx(total / 21, rel=1e-5)


@pytest.mark.slow
def test_learned_rounding_beats_the_nearest() -> None:
    nearest = image_error(compressed(FAMILIES["unet"].build(), {"brecq": {"scheme": W4, "steps": 0}}))
    learned = image_error(compressed(FAMILIES["unet"].build(), {"brecq": {"scheme": W4, "steps": 150, "rate": 0.02, "batch": 8}}))
    assert learned < nearest / 2


def test_every_layer_is_reached_and_integers_are_neighbours() -> None:
    before = dict(opened("unet").module.named_modules())
    network = compressed(FAMILIES["unet"].build(), {"brecq": {"scheme": W4, "steps": 10, "batch": 4}})
    layers = {name for name, part in before.items() if isinstance(part, nn.Linear | nn.Conv2d)}
    twins = {name: part for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}
    assert twins.keys() == layers
    assert any(isinstance(twin, QuantConv2d) for twin in twins.values())
    for name, twin in twins.items():
        layer = before[name]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        distance = (twin.dequantized(torch.float32) - matrix(layer)).abs() / twin.grid().scale
        assert distance.quantile(0.95) < 1, "the floor or one more, save for what the range cuts off"
    assert not network.module.training


def test_dropout_is_off_whatever_mode_a_network_comes_in() -> None:
    """The released code reconstructs in train mode, where every forward drops something else."""
    results = []
    for seed, training in ((0, False), (1, True)):
        module = FAMILIES["unet"].build()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
        seen: list[bool] = []
        module.conv_in.register_forward_hook(lambda layer, *_, seen=seen: seen.append(layer.training))
        torch.manual_seed(seed)
        network = compressed(module.train(training), {"brecq": {"scheme": W4, "steps": 5, "batch": 4}})
        assert not any(seen)
        results.append(network.module.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_channel_of_zeros_is_stored_as_zeros() -> None:
    """Zero-initialised convolutions have them, and a range of nothing must still be a range."""
    module = FAMILIES["unet"].build()
    module.conv_out.weight.data[0] = 0
    network = compressed(module, {"brecq": {"scheme": W4, "steps": 5, "batch": 4}}, {"activation_ranges": {"steps": 0}})
    twin = network.module.get_submodule("conv_out")
    assert isinstance(twin, QuantConv2d)
    assert bool((twin.dequantized(torch.float32)[0] == 0).all())
    assert all(bool(output(network.module, call).isfinite().all()) for call in calls())


def test_both_parts_of_a_split_layer_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released loss of Q-Diffusion forgets the regulariser of the second part."""
    fit = {"scheme": W4, "steps": 3, "batch": 4, "warmup": 0.0}
    drawn: dict[int, Tensor] = {}
    real = brecq.undecided

    def spy(alpha: Tensor, beta: float) -> Tensor:
        drawn[id(alpha)] = alpha
        return real(alpha, beta)

    monkeypatch.setattr(brecq, "undecided", spy)
    network = compressed(FAMILIES["unet"].build(), {"split_shortcut": {}}, {"brecq": fit})
    apart = [part for part in network.module.modules() if isinstance(part, Split)]
    assert apart
    assert all(isinstance(part, QuantLinear) for layer in apart for part in layer.children())
    assert len(drawn) == sum(isinstance(part, QuantLinear) for part in network.module.modules()), "a term for every layer and part"


def test_what_is_quantized_already_is_not_touched() -> None:
    network = compressed(FAMILIES["unet"].build(), {"tiar": {"steps": 5}})
    path = {name: part.dequantized(torch.float32) for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}
    again = compressed(FAMILIES["unet"].build(), {"tiar": {"steps": 5}}, {"brecq": {"scheme": W4, "steps": 5, "batch": 4}})
    for name, weight in path.items():
        twin = again.module.get_submodule(name)
        assert isinstance(twin, QuantLinear)
        assert torch.equal(twin.dequantized(torch.float32), weight)


def test_targets_are_the_float_networks_and_inputs_those_of_what_was_done() -> None:
    """The second block sees the first one's rounding, and is asked for what the float network's block gave on its own inputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    original = Brecq.learn

    def spy(self: Brecq, block: Any, module: nn.Module, jobs: Any, samples: Samples, alone: str = "") -> None:
        ((call, wanted, _),) = samples.take([0])
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        seen[block.full_name(alone) if alone else block.name] = (call.args[0].clone(), wanted.clone())
        original(self, block, module, jobs, samples, alone)

    plain = opened("unet")
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
        inputs[name], outputs[name] = args[0], y[0] if isinstance(y, tuple) else y

    for name, block in plain.blocks().items():
        block.register_forward_hook(partial(keep, name))
    output(plain.module, calls()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Brecq, "learn", spy)
        compressed(FAMILIES["unet"].build(), {"brecq": {"scheme": "W3A16_CHANNEL", "steps": 0, "targets": ["*resnets*"]}})
    first, second = "down_blocks.0.resnets.0", "down_blocks.1.resnets.0"
    assert torch.equal(seen[first][0][0], inputs[first][0])
    assert not torch.allclose(seen[second][0][0], inputs[second][0], atol=1e-3)
    for name in (first, second):
        torch.testing.assert_close(seen[name][1][0], outputs[name][0], rtol=0, atol=1e-5)


def test_a_language_model_in_a_folder_has_a_teacher_too(tmp_path: Path) -> None:
    tiny = FAMILIES["llama"]
    tiny.build().save_pretrained(tmp_path / "source")
    recipe = {"steps": [{"brecq": {"scheme": W4, "steps": 20, "batch": 4, "targets": ["Linear"]}}]}
    samples = [tiny.calls(1)[0]] * 2
    aerogel.compress(tmp_path / "source", recipe, samples=samples, output=tmp_path / "lazy", measures=())
    live = aerogel.compress(tiny.build(), recipe, samples=samples, measures=()).network
    lazy = aerogel.load(tmp_path / "lazy", lazy=False)
    torch.testing.assert_close(output(lazy.module, samples[0]), output(live.module, samples[0]), rtol=0, atol=1e-4)


def test_the_plan_counts_what_the_optimiser_does() -> None:
    network = FAMILIES["unet"].build()
    few, many = (
        aerogel.plan(network, {"steps": [{"brecq": {"scheme": W4, "steps": steps}}]}, samples=calls()).seconds["compress"]
        for steps in (10, 20000)
    )
    assert many > 100 * few


def test_static_inputs_are_anothers_affair() -> None:
    with pytest.raises(AerogelError, match="put activation_ranges after it"):
        Brecq(scheme="W8A8_STATIC")
    with pytest.raises(AerogelError, match="put activation_ranges after it"):
        Brecq(overrides={"conv_in": "W8A8_AFFINE"})
    with pytest.raises(AerogelError, match="put fsc after it"):
        Tiar(scheme="W8A8")


def test_a_convolution_has_no_tokens() -> None:
    with pytest.raises(AerogelError, match="a convolution reads no tokens"):
        compressed(FAMILIES["unet"].build(), {"brecq": {"scheme": "W4A8"}})


@pytest.mark.parametrize("method", [Brecq, Tiar])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC"])
def test_rounding_is_learned_for_integers_only(method: type[Brecq | Tiar], scheme: str) -> None:
    with pytest.raises(AerogelError, match=f"learns to round to integers, and {scheme} stores floats; give an integer scheme"):
        method(scheme=scheme)
