"""The linear of unsigned inputs in oneDNN against float64, with and without zero points, a step at a time, and at the extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.kernels import affine
from aerogel.kernels.affine import Affine, exact
from aerogel.kernels.kernel import ACTIVATIONS
from aerogel.kernels.linear import candidates, pack, run
from aerogel.layers.conv import quantized, with_inputs
from aerogel.layers.linear import QuantLinear
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import dequantize, fake_quantize, grid_from_range, quantize, weight_grid
from aerogel.numerics.scheme import PerStep, Scheme, TensorScheme
from tests.kernels.exact_sums import needs_exact_sums


def made(name: str, bias: bool = True) -> tuple[QuantLinear, Tensor]:
    torch.manual_seed(0)
    linear, scheme = nn.Linear(40, 24, bias=bias), Scheme.parse(name)
    grid = weight_grid(linear.weight, scheme.weights)
    assert scheme.inputs is not None
    inputs = grid_from_range(torch.tensor(-1.0), torch.tensor(3.0), scheme.inputs)
    return quantized(linear, scheme, quantize(linear.weight, grid, scheme.weights), grid, None, inputs), torch.randn(7, 40) + 0.5


def literal(twin: QuantLinear, x: Tensor) -> Tensor:
    inputs, grid = twin.scheme.inputs, twin.input_grid()
    assert inputs is not None
    assert grid is not None
    weight_OI = dequantize(twin.codes(), twin.grid(), twin.scheme.weights).double()
    y = fake_quantize(x.float(), grid, inputs).double() @ weight_OI.T
    return y if twin.bias is None else y + twin.bias.double()


@needs_exact_sums
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_AFFINE", "W8A8_ASYM_AFFINE", "W4A8_CHANNEL_ASYM_AFFINE", "W3A8_CHANNEL_AFFINE"])
def test_integers_give_the_exact_sum(name: str, bias: bool) -> None:
    twin, x = made(name, bias)
    assert "affine" in candidates(twin, x.device, x.dtype)
    torch.testing.assert_close(Affine(twin, x.dtype)(x).double(), literal(twin, x), rtol=1e-5, atol=1e-5)
    rounded = Affine(twin, torch.bfloat16)(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), literal(twin, x.bfloat16()), rtol=2**-7, atol=2**-7)


def test_one_packed_weight_serves_the_scales_of_all_steps() -> None:
    twin, x = made("W4A8_CHANNEL_ASYM_AFFINE")
    inputs = TensorScheme(format_named("int8"), PerStep(2), symmetric=False)
    stepped = with_inputs(twin, inputs, grid_from_range(torch.tensor([-1.0, -4.0]), torch.tensor([1.0, 3.0]), inputs))
    stepped.timestep_index = TimestepIndex([9, 4])
    kernel = Affine(stepped, x.dtype)
    for row in (0, 1, 0):
        with stepped.timestep_index.at((row,)):
            torch.testing.assert_close(kernel(x).double(), literal(stepped, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", ["rows", "channels last", "a slice"])
def test_inputs_of_any_layout_are_quantized_piece_by_piece(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, _ = made("W8A8_AFFINE")
    monkeypatch.setattr(affine, "CHUNK_VALUES", 50)
    x = 3 * torch.randn(2, 8, 6, 5)
    x = {"rows": x, "channels last": x.to(memory_format=torch.channels_last), "a slice": x[:, 1::2, :, 2:]}[of]
    codes, scale, zero = affine.quantized(x, twin)
    inputs, grid = twin.scheme.inputs, twin.input_grid()
    assert inputs is not None
    assert grid is not None
    torch.testing.assert_close((codes.double() - zero) * scale, fake_quantize(x, grid, inputs).double())


def test_sums_of_extremes_are_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, x = made("W8A8_AFFINE")
    assert exact() == ("affine" in candidates(twin, x.device, x.dtype))
    monkeypatch.setattr("aerogel.kernels.affine.exact", lambda: False)
    assert "affine" not in candidates(twin, x.device, x.dtype)


@needs_exact_sums
def test_layers_of_one_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, x), (second, _) = made("W8A8_AFFINE"), made("W8A8_AFFINE", bias=False)
    kernels, coded = [Affine(twin, x.dtype) for twin in (first, second)], []
    plain = affine.unsigned_codes
    monkeypatch.setattr(affine, "unsigned_codes", lambda *given: coded.append(given) or plain(*given))

    def give() -> None:
        for twin, kernel in zip((first, second), kernels, strict=True):
            # As the callers do: each time another view of the same memory.
            torch.testing.assert_close(kernel(x.view(7, 40)).double(), literal(twin, x), rtol=1e-5, atol=1e-5)

    give()
    assert len(coded) == 1
    give()
    assert len(coded) == 2, "a layer that comes around again has a new input, even where the old one was"
    kernels[0](x)
    x.mul_(0.5)
    torch.testing.assert_close(kernels[1](x).double(), literal(second, x), rtol=1e-5, atol=1e-5)
    x = x + 0.25
    torch.testing.assert_close(kernels[0](x).double(), literal(first, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels[1](x[:4]).double(), literal(second, x[:4]), rtol=1e-5, atol=1e-5)


@needs_exact_sums
def test_inputs_of_inference_mode_have_no_version_and_are_coded_each_time() -> None:
    (first, x), (second, _) = made("W8A8_AFFINE"), made("W8A8_AFFINE")
    with torch.inference_mode():
        x = x.clone()
        for twin in (first, second):
            torch.testing.assert_close(Affine(twin, x.dtype)(x).double(), literal(twin, x), rtol=1e-5, atol=1e-5)
            x.mul_(0.5)


@needs_exact_sums
@pytest.mark.parametrize("name", ["W8A8_AFFINE", "W8A8_STATIC", "W8A8_ASYM_AFFINE"])
@pytest.mark.parametrize("after", sorted(ACTIVATIONS))
def test_an_activation_may_follow_every_kernel(name: str, after: str) -> None:
    twin, x = made(name)
    wanted = ACTIVATIONS[after](literal(twin, x))
    assert "affine" in candidates(twin, x.device, x.dtype)
    for kernel in candidates(twin, x.device, x.dtype):
        torch.testing.assert_close(pack(kernel, twin, x.dtype).followed(x, after).double(), wanted, rtol=1e-5, atol=1e-5)
    assert run(x[:0], twin, {}, after).shape == (0, 24)
    x.requires_grad_()
    y = run(x, twin, {}, after)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert y.requires_grad
