"""bitsandbytes checkpoints open as the float models that a literal reader makes of them."""

from __future__ import annotations

import json
import math
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
from aerogel.io.dequantize import bitsandbytes
from aerogel.io.dequantize.bitsandbytes import State, dequantize_4bit, dequantize_int8
from tests.tiny import FAMILIES, output
from tests.twins import UP, change, configure, opened, random_codes, same, tensors_of, twins

RTN = {"steps": [{"rtn": {"scheme": "W8A8"}}]}
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def packed(
    name: str, weight: Tensor, generator: torch.Generator, kind: str = "nf4", block: int = 64, nested: int = 256
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layer in 4 bits, and the value of each code times the scale of its block."""
    count = weight.numel()
    codes, blocks = random_codes((count,), 16, generator).tolist(), math.ceil(count / block)
    quant_map = torch.rand(16, generator=generator) * 2 - 1
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    halves = [*codes, 0] if count % 2 else codes
    bytes_ = [halves[place] << 4 | halves[place + 1] for place in range(0, len(halves), 2)]
    made = {"": torch.tensor(bytes_, dtype=torch.uint8).unsqueeze(1), ".quant_map": quant_map}
    if nested:
        inner, outer = random_codes((blocks,), 256, generator), torch.rand(math.ceil(blocks / nested), generator=generator) * 0.01
        table = torch.rand(256, generator=generator)
        made |= {".absmax": inner.to(torch.uint8), ".nested_absmax": outer, ".nested_quant_map": table}
        scales = torch.stack([table[inner[b]] * outer[b // nested] + 0.125 for b in range(blocks)])
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.125}
    else:
        scales = made[".absmax"] = torch.rand(blocks, generator=generator) * 0.1
    exact = (quant_map[torch.tensor(codes)] * scales[torch.arange(count) // block]).reshape(weight.shape)
    made[f".quant_state.bitsandbytes__{kind}"] = json_bytes(state)
    return {f"{name}.weight{part}": tensor for part, tensor in made.items()}, exact


def json_bytes(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def packed_int8(name: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layer in 8 bits, and weight * SCB / 127."""
    codes, scales = random_codes(tuple(weight.shape), 255, generator) - 127, torch.rand(len(weight), generator=generator)
    exact = torch.stack([row * (scale / 127) for row, scale in zip(codes.float(), scales, strict=True)])
    return {
        f"{name}.weight": codes.to(torch.int8),
        f"{name}.SCB": scales,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }, exact


@pytest.mark.parametrize("nested", [256, 4, 0])
@pytest.mark.parametrize(("shape", "block"), [((8, 64), 64), ((6, 50), 64), ((3, 5), 4), ((1, 1), 32)])
def test_values_of_codes_times_scales_of_blocks(shape: tuple[int, int], block: int, nested: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, exact = packed("a", torch.empty(shape), torch.Generator().manual_seed(0), block=block, nested=nested)
    parts = [made[f"a.weight{part}"] for part in ("", ".absmax", ".quant_map")]
    parts += [made[f"a.weight{part}"] for part in (".nested_absmax", ".nested_quant_map") if nested]
    state = State(shape, block, nested, 0.125)
    for at_once in (1 << 20, 100, 1):
        monkeypatch.setattr(bitsandbytes, "_AT_ONCE", at_once)
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(dequantize_4bit(*parts, state=state, dtype=dtype), exact.to(dtype))


def test_what_bitsandbytes_makes_of_its_own_tensors() -> None:
    """Measured with bitsandbytes 0.50.2 (quantize_4bit of eight numbers in nf4): codes, scale, and what it dequantizes them to."""
    nf4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    nf4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    nf4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    stored = torch.tensor([[240], [134], [173], [55]], dtype=torch.uint8)
    found = dequantize_4bit(stored, torch.tensor([4.0]), torch.tensor(nf4), state=State((1, 8), 64), dtype=torch.float32)
    measured = [4.0, -4.0, 0.31832119822502136, -0.3642001450061798, 0.9844492077827454, 2.2504680156707764, -1.5796699523925781, 0.0]
    assert found[0].tolist() == measured


def test_rows_of_int8_times_their_scale() -> None:
    made, exact = packed_int8("a", torch.empty(5, 7), torch.Generator().manual_seed(0))
    assert torch.equal(dequantize_int8(made["a.weight"], made["a.SCB"], dtype=torch.bfloat16), exact.to(torch.bfloat16))
    first, scale = int(made["a.weight"][2, 3]), float(made["a.SCB"][2])
    assert float(dequantize_int8(made["a.weight"], made["a.SCB"], dtype=torch.float32)[2, 3]) == pytest.approx(first * scale / 127)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp("bitsandbytes"), packed, CONFIG)


@pytest.fixture
def quantized(both: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(both[0], tmp_path / "quantized"))


def test_a_folder_opens_as_the_float_model_and_is_compressed(both: tuple[Path, Path], tmp_path: Path) -> None:
    module, expected = opened(both[0]), opened(both[1], lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert plan(both[0], RTN).remarks[0] == (
        "the source is quantized (bitsandbytes: nf4 with a scale per block of 64, scales in int8); its weights are dequantized to "
        "bfloat16; this recipe starts from the dequantized weights"
    )
    for folder in both:
        aerogel.compress(folder, RTN, output=tmp_path / folder.name, measures=())
    assert same(tensors_of(tmp_path / "quantized"), tensors_of(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (packed_int8, r"bitsandbytes: int8 with a scale per channel"),
        (partial(packed, kind="fp4", nested=0), r"bitsandbytes: fp4 with a scale per block of 64"),
    ],
)
def test_other_kinds_open_too(pack: Any, told: str, tmp_path: Path) -> None:
    quantized, plain = twins(tmp_path, pack, {"quant_method": "bitsandbytes"}, "mixtral")
    module, expected = opened(quantized), opened(plain, lazy=False)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert open_model(quantized).dequantized == f"the source is quantized ({told}); its weights are dequantized to bfloat16"
    (call,) = FAMILIES["mixtral"].calls(1)
    assert torch.equal(output(module, call), output(expected, call))


def state(**changes: Any) -> Tensor:
    return json_bytes({"quant_type": "nf4", "blocksize": 64, "shape": [128, 64], "nested_blocksize": 256, "nested_offset": 0.1} | changes)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({STATE: None}, rf"config.json says bitsandbytes, and {UP}.weight is torch.uint8 without {STATE} or fp4"),
        ({STATE: torch.ones(3)}, rf"{STATE} is \[3\] of torch.float32, expected JSON in bytes"),
        ({STATE: torch.ones(3, dtype=torch.uint8)}, rf"{STATE} is not JSON"),
        ({STATE: json_bytes([1])}, rf"{STATE} holds a JSON array, expected an object"),
        ({STATE: state(quant_type="fp4")}, r"says quant_type='fp4', expected nf4 or fp4 as in its name"),
        ({STATE: state(shape=[128])}, r"says shape=\[128\], expected two positive integers"),
        ({STATE: state(shape=[128, -64])}, r"says shape=\[128, -64\], expected two"),
        ({STATE: state(shape=[128, 65])}, rf"{UP}.weight has 4096 bytes, expected 4160 for \[128, 65\] in 4 bits"),
        ({STATE: state(shape=[64, 128])}, rf"{UP}.weight is \[64, 128\], the model expects \[128, 64\]"),
        ({STATE: state(blocksize=0)}, r"says blocksize=0 and nested_blocksize=256, expected even sizes"),
        ({STATE: state(blocksize=32)}, rf"{UP}.weight.absmax is \[128\] of torch.uint8, expected \[256\] or \[256, 1\] of torch.uint8"),
        ({STATE: state(nested_blocksize=64)}, rf"{UP}.weight.nested_absmax is \[1\] of torch.float32, expected \[2\]"),
        ({STATE: state(nested_offset=math.nan)}, r"says nested_offset=nan, expected a number"),
        ({f"{UP}.weight": None}, rf"{UP}.weight has no {UP}.weight; get all files"),
        ({f"{UP}.weight.absmax": None}, rf"{UP}.weight has no {UP}.weight.absmax"),
        ({f"{UP}.weight.absmax": torch.ones(128)}, rf"{UP}.weight.absmax is \[128\] of torch.float32, expected \[128\] or"),
        ({f"{UP}.weight.quant_map": torch.ones(8)}, rf"{UP}.weight.quant_map is \[8\] of torch.float32, expected \[16\]"),
        ({f"{UP}.weight.nested_quant_map": None}, rf"{UP}.weight has no {UP}.weight.nested_quant_map"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(changed: dict[str, Tensor | None], expected: str, quantized: Path) -> None:
    change(quantized, changed)
    with pytest.raises(AerogelError, match=expected) as error:
        open_model(quantized)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{UP}.SCB": None}, rf"{UP}.weight has no {UP}.SCB; get all files"),
        ({f"{UP}.SCB": torch.ones(64)}, rf"{UP}.SCB is \[64\] of torch.float32, expected \[128\]"),
        ({f"{UP}.weight_format": torch.tensor(3, dtype=torch.uint8)}, rf"{UP}.weight_format is 3, expected 0 \(row by row\)"),
        ({f"{UP}.weight": torch.ones(8192, 1, 1, dtype=torch.int8)}, rf"{UP}.weight is \[8192, 1, 1\] of torch.int8, expected a matrix"),
    ],
)
def test_rows_of_int8_that_do_not_go_together_are_refused(changed: dict[str, Tensor | None], expected: str, tmp_path: Path) -> None:
    quantized, _ = twins(tmp_path, packed_int8, {})
    configure(quantized, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    change(quantized, changed)
    with pytest.raises(AerogelError, match=expected):
        open_model(quantized)
