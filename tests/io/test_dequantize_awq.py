"""AWQ checkpoints open as the float models that a literal reader makes of them, in both versions of the layout."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.engine.opening import open_model
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.io.dequantize.awq import dequantize_gemm, dequantize_gemv
from tests.tiny import FAMILIES, output
from tests.twins import UP, change, configure, opened, random_codes, same, tensors_of, twins, words

RTN = {"steps": [{"rtn": {"scheme": "W8A8"}}]}
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of eight that is in each place of a word, from the lowest bits on."""


def interleaved(codes: list[int]) -> list[int]:
    """Pack codes into words of version gemm."""
    return words([codes[first + place] for first in range(0, len(codes), 8) for place in ORDER], 4)


def packed(
    name: str, weight: Tensor, generator: torch.Generator, version: str = "gemm", group: int = 32
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layer as AutoAWQ stores them, and scale * (code - zero)."""
    outputs, inputs = weight.shape
    groups = inputs // group
    codes, zeros = random_codes((outputs, inputs), 16, generator), random_codes((outputs, groups), 16, generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 1e-2 + 1e-3).half()
    of_input = torch.arange(inputs) // group
    exact = scales.float()[:, of_input] * (codes - zeros[:, of_input])
    if version == "gemm":
        stored = [[interleaved(row) for row in part.T.tolist()] for part in (codes, zeros)]
        return tensors(name, *stored, scales.T.contiguous()), exact
    width = {128: 1, 64: 2, 32: 4}[group] * -(-groups // (8 * {128: 1, 64: 2, 32: 4}[group]))
    filled = torch.zeros(outputs, 8 * width, dtype=torch.float16)
    filled[:, :groups] = scales
    stored = [[words(row, 4) for row in codes.tolist()], [words(row + [0] * (8 * width - groups), 4) for row in zeros.tolist()]]
    return tensors(name, *stored, filled), exact


def tensors(name: str, qweight: list[list[int]], qzeros: list[list[int]], scales: Tensor) -> dict[str, Tensor]:
    made = {part: torch.tensor(rows, dtype=torch.int32) for part, rows in {"qweight": qweight, "qzeros": qzeros}.items()}
    return {f"{name}.{part}": tensor for part, tensor in {**made, "scales": scales}.items()}


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("version", "dequantize"), [("gemm", dequantize_gemm), ("gemv", dequantize_gemv)])
def test_codes_minus_zero_points_times_scales(version: str, dequantize: Any, group: int) -> None:
    made, exact = packed("a", torch.empty(16, 384), torch.Generator().manual_seed(0), version, group)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(dequantize(*made.values(), group=group, dtype=dtype), exact.to(dtype))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp("awq"), packed, CONFIG)


@pytest.fixture
def quantized(both: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(both[0], tmp_path / "quantized"))


def test_a_folder_opens_as_the_float_model_and_is_compressed(both: tuple[Path, Path], tmp_path: Path) -> None:
    module, expected = opened(both[0]), opened(both[1], lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert (
        plan(both[0], RTN)
        .remarks[0]
        .startswith(
            "the source is quantized (awq: int4 with a scale per group of 32); its weights are dequantized to bfloat16; this recipe"
        )
    )
    for folder in both:
        aerogel.compress(folder, RTN, output=tmp_path / folder.name, measures=())
    assert same(tensors_of(tmp_path / "quantized"), tensors_of(tmp_path / "plain"))


def test_version_gemv(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMV"}
    quantized, plain = twins(tmp_path, partial(packed, version="gemv", group=64), config)
    module, expected = opened(quantized), opened(plain, lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    (call,) = FAMILIES["llama"].calls(1)
    assert torch.equal(output(module, call), output(expected, call))
    configure(quantized, config | {"version": "gemm"})
    with pytest.raises(AerogelError, match=r"\.qzeros is \[\d+, 2\] of torch.int32, expected"):
        open_model(quantized)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{UP}.qzeros": None}, rf"config.json says awq, and {UP}.qweight has no {UP}.qzeros; get all files"),
        ({f"{UP}.scales": None}, rf"{UP}.qweight has no {UP}.scales"),
        ({f"{UP}.qweight": torch.ones(64, 16)}, rf"{UP}.qweight is \[64, 16\] of torch.float32, expected a matrix of torch.int32"),
        ({f"{UP}.qweight": torch.ones(48, 16).int()}, rf"group_size is 32, which does not divide the 48 inputs of {UP}.qweight"),
        ({f"{UP}.qweight": torch.ones(64, 8).int()}, rf"{UP}.qzeros is \[2, 16\] of torch.int32, expected \[2, 8\]"),
        ({f"{UP}.qzeros": torch.ones(3, 16).int()}, rf"{UP}.qzeros is \[3, 16\] of torch.int32, expected \[2, 16\]"),
        ({f"{UP}.scales": torch.ones(2, 16).half()}, rf"{UP}.scales is \[2, 16\] of torch.float16, expected \[2, 128\]"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(changed: dict[str, Tensor | None], expected: str, quantized: Path) -> None:
    change(quantized, changed)
    with pytest.raises(AerogelError, match=expected) as error:
        open_model(quantized)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bits": 3}, r"bits is 3, expected one of 4"),
        ({"zero_point": False}, r"zero_point is False, expected one of True"),
        ({"backend": "llm-awq"}, r"backend is 'llm-awq', expected one of autoawq"),
        ({"version": "gemv_fast"}, r"version is 'gemv_fast', expected one of gemm, gemv"),
        ({"version": 3}, r"version is 3, expected one of gemm, gemv"),
        ({"group_size": 48}, r"group_size is 48, which does not divide the 128 inputs"),
        ({"group_size": 64}, r"\.qzeros is \[4, \d+\] of torch.int32, expected \[2, \d+\]"),
        ({"group_size": 0.5}, r"group_size is 0.5, expected -1 or a positive integer"),
    ],
)
def test_settings_that_the_layout_does_not_have_are_refused(config: dict[str, Any], expected: str, quantized: Path) -> None:
    configure(quantized, CONFIG | config)
    with pytest.raises(AerogelError, match=expected) as error:
        open_model(quantized)
    assert "\n" not in str(error.value)
