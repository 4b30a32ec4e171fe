"""Every kernel against the product written out in float64, the choice between them, and when the reference answers instead."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.kernels import int8, linear, reference, synchronized_clock
from aerogel.kernels.int4 import kernel_group
from aerogel.kernels.int8 import exact_on_cpu
from tests.clocks import Manual
from tests.kernels.weights import Plain, inputs, plain

CPU = torch.device("cpu")
SHAPES = [(48, 128), (33, 96), (7, 100), (16, 576)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INT4 = ["W4A16", "W4A16_G64", "W4A16_G32_ASYM", "W4A16_CHANNEL", "W3A16_G64", "W2A16_G32_ASYM", "W8A16_G64_ASYM", "W5A16_CHANNEL"]


def float_product(weight: Plain, x: torch.Tensor) -> torch.Tensor:
    y = x.double() @ weight.exact().T
    return y if weight.bias is None else y + weight.bias.double()


def int8_product(weight: Plain, x: torch.Tensor) -> torch.Tensor:
    """W8A8 row by row, in Python integers where it matters: scales are float32, sums are exact."""
    rows = []
    for row in x.float():
        if weight.input_scale is not None:
            scale = weight.input_scale
        else:
            scale = row.abs().max() / 127.5 if row.any() else torch.tensor(torch.finfo(torch.float32).eps)
        codes = (row / scale).clamp(-128, 127).round().long()
        rows.append((weight.integers.long() @ codes).double() * scale.double() * weight.scale[:, 0].double())
    y = torch.stack(rows)
    return y if weight.bias is None else y + weight.bias.double()


def relative(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", INT4)
@pytest.mark.parametrize("bias", [False, True])
def test_int4_is_the_float_product_to_bfloat16_rounding(preset: str, shape: tuple[int, int], bias: bool) -> None:
    weight = plain(preset, *shape, bias=bias)
    x = torch.randn(64, shape[1], generator=torch.Generator().manual_seed(1))
    y = linear.pack("int4", weight, x.dtype)(x)
    assert y.dtype == x.dtype
    assert relative(y, float_product(weight, x)) < 5e-3  # a channel whose scale rounds badly is off by 2**-8


@pytest.mark.parametrize("dtype", FLOATS)
def test_int4_keeps_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    weight, x = plain("W4A16_G32", 24, 64, bias=True), inputs(2, 64, dtype)
    y = linear.pack("int4", weight, dtype)(x)
    assert y.dtype == dtype
    assert relative(y, float_product(weight, x)) < 6e-3


def test_int4_multiplies_exactly_when_nothing_needs_rounding() -> None:
    """Powers of two survive bfloat16: any error left would be in the packing."""
    weight = plain("W4A16_G64_ASYM", 40, 192)
    weight.scale = torch.exp2(torch.randint(-3, 3, weight.scale.shape).float())
    x = torch.eye(192)
    assert torch.equal(linear.pack("int4", weight, x.dtype)(x).T.double(), weight.exact())


def test_int4_follows_the_groups_of_activation_order() -> None:
    weight, x = plain("W4A16_G32", 32, 160, act_order=True), inputs(4, 160)
    assert weight.g_idx is not None
    assert weight.g_idx.diff().min() < 0, "columns must be out of order for this test to mean anything"
    assert relative(linear.pack("int4", weight, x.dtype)(x), float_product(weight, x)) < 6e-3


@pytest.mark.parametrize(
    ("columns", "span", "group"),
    [
        (4096, 128, 128),
        (576, 64, 64),
        (576, 128, 64),
        (576, 576, 64),
        (1536, 1536, 256),
        (100, 64, 32),
        (100, 100, 32),
        (64, 16, None),
        (96, 48, None),
    ],
)
def test_the_kernel_group_divides_the_scheme_group_and_avoids_padding(columns: int, span: int, group: int | None) -> None:
    assert kernel_group(columns, span) == group


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("preset", ["W8A8", "W8A8_STATIC", "W4A8"])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_differs_from_integer_arithmetic_by_float_rounding_only(preset: str, rows: int, shape: tuple[int, int], bias: bool) -> None:
    weight, x = plain(preset, *shape, bias=bias), inputs(rows, shape[1])
    y = linear.pack("int8", weight, x.dtype)(x)
    torch.testing.assert_close(y.double(), int8_product(weight, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rounds_once_to_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    weight, x = plain("W8A8", 24, 64), inputs(5, 64, dtype)
    y = linear.pack("int8", weight, dtype)(x)
    torch.testing.assert_close(y, int8_product(weight, x).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_many_rows_are_multiplied_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = plain("W8A8", 24, 64), inputs(7, 64)
    whole = linear.pack("int8", weight, x.dtype)(x)
    monkeypatch.setattr(int8, "CHUNK_ROWS", 3)
    assert torch.equal(linear.pack("int8", weight, x.dtype)(x), whole)


@pytest.mark.parametrize("preset", ["W8A8", "W8A8_STATIC"])
def test_torch_compile_gets_the_integer_product(preset: str) -> None:
    weight, x = plain(preset, 24, 64), inputs(5, 64).unflatten(0, (5, 1))
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(backend=spy, fullgraph=True)
    def multiply(x: torch.Tensor) -> torch.Tensor:
        return linear.run(x, weight, {})

    with torch.no_grad():
        y = multiply(x)
    assert any("_int_mm" in name for name in seen)
    torch.testing.assert_close(y.flatten(0, 1).double(), int8_product(weight, x.flatten(0, 1)), rtol=1e-6, atol=1e-6)


def test_integer_sums_do_not_saturate_here() -> None:
    assert exact_on_cpu(), "this processor's integer product is not exact; the int8 kernel stays off"


@pytest.mark.parametrize("name", ["reference", "sliced"])
@pytest.mark.parametrize("preset", ["W4A16_G64", "W3A16_G32_ASYM", "W8A16", "W8A8", "W8A8_STATIC"])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_reference_is_the_literal_product(preset: str, name: str, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SLICE_VALUES", 7 * 128)  # slices that do not divide the rows
    weight, x = plain(preset, 24, 128, bias=True, act_order=act_order), inputs(3, 128)
    wanted = float_product(weight, x) if weight.scheme.inputs is None else int8_product(weight, x)
    torch.testing.assert_close(linear.pack(name, weight, x.dtype)(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_slices_beat_bfloat16_arithmetic() -> None:
    weight = plain("W4A16_G64", 64, 512)
    x = inputs(8, 512, torch.bfloat16)
    wanted = float_product(weight, x)
    sliced, narrow = (relative(linear.pack(name, weight, x.dtype)(x), wanted) for name in ("sliced", "reference"))
    assert sliced < narrow
    assert sliced < 2**-8


@pytest.mark.parametrize(
    ("preset", "dtype", "names"),
    [
        ("W4A16_G64", torch.float32, ["int4", "sliced", "reference"]),
        ("W4A16_G16", torch.float32, ["sliced", "reference"]),
        ("W8A16", torch.bfloat16, ["int4", "sliced", "reference"]),
        ("W8A16_CHANNEL", torch.float32, ["int4", "sliced", "reference"]),
        ("W8A8", torch.float32, ["int8", "sliced", "reference"]),
        ("W8A8_G64", torch.float32, ["sliced", "reference"]),
        ("W8A8_ASYM", torch.float32, ["sliced", "reference"]),
        ("FP8_BLOCK", torch.float32, ["reference"]),
    ],
)
def test_who_can_multiply_what(preset: str, dtype: torch.dtype, names: list[str]) -> None:
    assert linear.candidates(plain(preset, 16, 128), CPU, dtype) == names


def test_asking_for_a_kernel_that_cannot_names_those_that_can() -> None:
    with pytest.raises(AerogelError, match=r"kernel 'int8' cannot .* W4A16_G64 .*able: int4, sliced, reference"):
        linear.pack("int8", plain("W4A16_G64", 16, 128), torch.float32)


class Wrong(linear.Kernel):
    """Gives zeros, so that choosing it shows."""

    name = "wrong"

    @staticmethod
    def accepts(weight: Any, device: torch.device, dtype: torch.dtype) -> bool:
        return True

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI.new_zeros(len(x_TI), 16)


@pytest.mark.usefixtures("kernels_by_time")
@pytest.mark.parametrize("few_rows", [True, False])
def test_the_fastest_kernel_is_measured_once_per_power_of_two_and_kept(monkeypatch: pytest.MonkeyPatch, few_rows: bool) -> None:
    ran: list[tuple[str, int]] = []
    clock = Manual()

    class Slow(Wrong):
        def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
            ran.append(("wrong", len(x_TI)))
            clock.seconds += 2
            return super().forward(x_TI)

    class Fast(linear.Reference):
        def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
            ran.append(("reference", len(x_TI)))
            clock.seconds += 1
            return super().forward(x_TI)

    monkeypatch.setattr(Slow, "few_rows", few_rows)
    monkeypatch.setattr(linear, "KERNELS", {"wrong": Slow, "reference": Fast})
    monkeypatch.setattr(synchronized_clock, "host_clock", clock)
    weight, cache = plain("W8A16", 16, 128), {}
    wanted = float_product(weight, inputs(128, 128))
    for rows in (3, 4, 4, 100, 70, 128):
        y = linear.run(inputs(128, 128)[:rows], weight, cache)
        torch.testing.assert_close(y.double(), wanted[:rows], rtol=1e-3, atol=1e-3)
    assert [rows for name, rows in ran if name == "wrong"] == [3] * 4 + [64] * 4 + [100] * 4 * (not few_rows), (
        "a few-row kernel that lost at 64 rows is not tried at 100"
    )
    assert [rows for name, rows in ran if name == "reference"] == [3] * 5 + [4] * 2 + [64] * 4 + [100] * (1 + 4 * (not few_rows)) + [
        70,
        128,
    ]


def test_run_keeps_shape_and_dtype_and_takes_no_rows() -> None:
    weight = plain("W4A16_G64", 24, 128, bias=True)
    x = inputs(6, 128, torch.bfloat16).view(2, 3, 128)
    y = linear.run(x, weight, {})
    assert (y.shape, y.dtype) == ((2, 3, 24), torch.bfloat16)
    assert relative(y.flatten(0, 1), float_product(weight, x.flatten(0, 1))) < 1e-2
    assert linear.run(x[:0], weight, {}).shape == (0, 3, 24)


@pytest.mark.parametrize("preset", ["W4A16_G64", "W8A8"])
def test_a_gradient_passes_through_the_reference(preset: str) -> None:
    weight, x = plain(preset, 24, 128), inputs(1, 128).requires_grad_()
    linear.run(x, weight, {}).sum().backward()
    assert x.grad is not None
    if weight.scheme.inputs is None:
        torch.testing.assert_close(x.grad[0].double(), weight.exact().sum(0), rtol=1e-4, atol=1e-5)
    else:
        assert x.grad.abs().sum() > 0


def test_kernels_do_not_keep_the_weight_alive() -> None:
    weight: Plain = plain("W8A16", 16, 128)
    cache: dict[Any, Any] = {}
    weight.cache = cache  # type: ignore[attr-defined]
    linear.run(inputs(2, 128), weight, cache)
    watch = weakref.ref(weight)
    gc.disable()
    try:
        del weight
        assert watch() is None, "freed at once, without the collector"
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("preset", "name"), [("W4A16_G64_ASYM", "int4"), ("W3A16_G32", "int4"), ("W8A8", "int8")])
@pytest.mark.parametrize("rows", [1, 40])
def test_cuda_kernels_are_the_cpu_reference(preset: str, name: str, rows: int) -> None:
    weight, x = plain(preset, 48, 576, bias=True), inputs(rows, 576, torch.bfloat16)
    wanted = float_product(weight, x) if weight.scheme.inputs is None else int8_product(weight, x)
    assert relative(linear.pack(name, weight.to("cuda"), x.dtype)(x.cuda()).cpu(), wanted) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA device that multiplies fp8"
)
def test_cuda_fp8_is_the_reference() -> None:
    weight = plain("FP8_DYNAMIC", 48, 576, bias=True)
    weight.integers = torch.randn(48, 576).to(torch.float8_e4m3fn)
    x = inputs(20, 576, torch.bfloat16)
    wanted = linear.pack("reference", weight, torch.float32)(x.float()).double()
    assert relative(linear.pack("fp8", weight.to("cuda"), x.dtype)(x.cuda()).cpu(), wanted) < 1e-2
