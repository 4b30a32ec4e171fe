"""Filters that leave are those of least loss; what is left is the block with these channels at zero, on disk and behind quantization."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import unfold

import aerogel
from aerogel.engine.exporting import export
from aerogel.model.calls import Call
from aerogel.model.structure.filters import filters_of
from tests.registration import registered
from tests.tiny import FAMILIES, VARIANTS, output

ZOO = Path(__file__).parents[3] / "zoo"
MATRIX = {"bound": 0.9}
BLOCK = "down_blocks.0.resnets.0"
UNETS = {"time step added": FAMILIES["unet"], "time step as scale and shift": VARIANTS["unet_pixels"]}


def pruned(model: nn.Module, calls: list[Call], folder: Path | None = None, then: Any = None, **given: Any) -> aerogel.Result:
    steps = [{"prune_conv_filters": given}, *([then] if then else [])]
    return aerogel.compress(model, {"name": "p", "steps": steps}, samples=calls, output=folder, measures=())


class Basic(nn.Module):
    """The block of a ResNet."""

    def __init__(self, norm: nn.Module | None = None, also: str = "") -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), norm or nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 1)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two convolutions give, and what the case adds."""
        y = torch.relu(self.norm(self.conv1(x)))
        if self.also == "reader":
            return x + self.conv2(y) + self.conv3(y)
        if self.also == "mean":
            return x + self.conv2(y) * y.mean()
        return x + self.conv2(y)


@pytest.mark.parametrize(("norm", "units"), [(nn.BatchNorm2d(8), 8), (nn.GroupNorm(4, 8), 4), (nn.GroupNorm(8, 8), 8), (nn.Identity(), 8)])
def test_filters_are_found_in_units_of_whole_groups(norm: nn.Module, units: int) -> None:
    (one,) = filters_of(Basic(norm).eval(), Call((torch.randn(2, 4, 6, 6),)))
    assert (one.reader, one.units) == ("conv2", units)
    assert one.columns_I.tolist() == [channel * units // 8 for channel in range(8) for _ in range(9)]
    expected = {"conv1.weight", "conv1.bias", *(f"norm.{name}" for name, tensor in norm.state_dict().items() if tensor.ndim)}
    assert one.rows.keys() == expected


@pytest.mark.parametrize(
    "block", [Basic(also="reader"), Basic(also="mean"), Basic(nn.GroupNorm(1, 8)), Basic(nn.GroupNorm(2, 8, affine=False))]
)
def test_channels_that_something_else_sees_stay(block: nn.Module) -> None:
    """A second reader, the block's output, one group of all channels, and a norm whose groups could not be counted anew."""
    assert filters_of(block.eval(), Call((torch.randn(2, 4, 6, 6),))) == ()


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("criterion", ["obs", "l1", "l2", "wanda", "magnitude"])
def test_without_repair_it_is_the_whole_model_with_zeros(name: str, criterion: str) -> None:
    """The literal reference: the columns of the reader that left are zero in the whole model."""
    tiny = UNETS[name]
    calls = tiny.calls(2)
    result = pruned(tiny.build(), calls, criterion=criterion, repair=False, share=0.5)
    whole, zeroed = tiny.build(), 0
    for line in result.journal:
        reader, maker = (f"{line['block']}.{part}" for part in ("conv2", "conv1"))
        before, after = whole.get_parameter(f"{maker}.weight"), result.network.module.get_parameter(f"{maker}.weight")
        gone = [one for one, row in enumerate(before) if not any(torch.equal(row, other) for other in after)]
        assert len(gone) == len(before) // 2
        groups = whole.get_submodule(line["block"]).norm2.num_groups  # type: ignore[union-attr]
        size = len(before) // groups
        assert sorted(gone) == [group * size + one for group in sorted({one // size for one in gone}) for one in range(size)]
        whole.get_parameter(f"{reader}.weight").data[:, gone] = 0
        zeroed += 1
    assert zeroed >= 6
    for call in calls:
        torch.testing.assert_close(output(result.network.module, call), output(whole, call), rtol=0, atol=2e-5)


def test_filter_norms_are_those_of_the_paper() -> None:
    """Sum of |w| over a group of filters, written out (arXiv:1608.08710); the projection of the time step counts too."""
    tiny = FAMILIES["unet"]
    result, whole = pruned(tiny.build(), tiny.calls(1), criterion="l1", repair=False, share=0.25), tiny.build()
    block: Any = whole.get_submodule(BLOCK)
    norms = [
        sum(
            float(block.conv1.weight[row].abs().sum() + block.time_emb_proj.weight[row].abs().sum())
            for row in range(group * 4, group * 4 + 4)
        )
        for group in range(8)
    ]
    kept = sorted(sorted(range(8), key=norms.__getitem__)[2:])
    rows = [group * 4 + one for group in kept for one in range(4)]
    assert torch.equal(result.network.module.get_parameter(f"{BLOCK}.conv1.weight"), block.conv1.weight[rows])


def test_the_reader_is_adjusted_by_least_squares() -> None:
    """Against torch.linalg.lstsq on the patches that the reader of the first block reads in the whole model."""
    tiny = FAMILIES["unet"]
    calls, whole = tiny.calls(16), tiny.build()
    result = pruned(tiny.build(), calls, share=0.5, percdamp=1e-9)
    seen: list[Tensor] = []
    reader: Any = whole.get_submodule(f"{BLOCK}.conv2")
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(unfold(args[0], 3, padding=1).transpose(1, 2).flatten(0, 1)))
    for call in calls:
        output(whole, call)
    handle.remove()
    x_TI, weight_OI = torch.cat(seen).double(), reader.weight.flatten(1).double()
    before, after = whole.get_parameter(f"{BLOCK}.conv1.weight"), result.network.module.get_parameter(f"{BLOCK}.conv1.weight")
    rows = [next(at for at, row in enumerate(before) if torch.equal(row, one)) for one in after]
    columns = [row * 9 + one for row in rows for one in range(9)]
    ours_OK = result.network.module.get_parameter(f"{BLOCK}.conv2.weight").flatten(1).double()
    theirs_KO = torch.linalg.lstsq(x_TI[:, columns], x_TI @ weight_OI.T).solution
    error = [float((x_TI[:, columns] @ one - x_TI @ weight_OI.T).square().sum()) for one in (ours_OK.T, theirs_KO, weight_OI[:, columns].T)]
    assert error[0] <= 1.01 * error[1]
    assert error[2] > 1.2 * error[1]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("then", [None, {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear", "Conv2d"]}}])
def test_a_folder_opens_as_it_was_saved(name: str, then: Any, tmp_path: Path) -> None:
    tiny = UNETS[name]
    calls = tiny.calls(2)
    result = pruned(tiny.build(), calls, tmp_path / "out", then, share=0.5)
    with pytest.raises(ValueError, match="aerogel"):
        type(tiny.build()).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    again = aerogel.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["narrowed"][f"{BLOCK}.norm2"] == {
        "num_channels": 16,
        "num_groups": 4,
    }
    for call in calls:
        torch.testing.assert_close(output(again.module, call), output(result.network.module, call), rtol=0, atol=1e-6)
    if then is None:  # a later run goes on from the folder
        steps = [{"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Conv2d"]}}]
        later = aerogel.compress(str(tmp_path / "out"), {"name": "q", "steps": steps}, samples=calls, output=tmp_path / "q", measures=())
        given = aerogel.load(tmp_path / "q").module
        torch.testing.assert_close(output(given, calls[0]), output(later.network.module, calls[0]), rtol=0, atol=1e-6)


def test_bit_masks_carry_the_widths_and_compressed_tensors_refuses_them(tmp_path: Path) -> None:
    tiny = FAMILIES["unet"]
    zeros = {"magnitude": {"sparsity": 0.6, "targets": ["Linear", "Conv2d"]}}
    pruned(tiny.build(), calls := tiny.calls(1), tmp_path / "out", zeros, share=0.5)
    export(tmp_path / "out", "bitmask", tmp_path / "masked")
    opened = [aerogel.load(tmp_path / name, lazy=False).module for name in ("out", "masked")]
    assert torch.equal(*(output(module, calls[0]) for module in opened))
    with pytest.raises(aerogel.AerogelError, match="is narrower than the model's configuration says"):
        export(tmp_path / "out", "compressed_tensors", tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("nobody", {"out_channels": 16}, "no layer nobody"),
        (f"{BLOCK}.conv1", {"out_channels": 64}, "is 64, expected 1 to 32"),
        (f"{BLOCK}.conv1", {"out_channels": 0}, "narrowed"),
        (f"{BLOCK}.conv1", {"width": 16}, "has 'width', expected out_channels, in_channels"),
        (f"{BLOCK}.nonlinearity", {"out_channels": 16}, "is a SiLU, which cannot be narrower"),
        (f"{BLOCK}.norm2", {"num_groups": 5}, "groups of one size"),
    ],
)
def test_a_damaged_entry_is_one_clear_error(name: str, told: dict[str, int], message: str, tmp_path: Path) -> None:
    tiny = FAMILIES["unet"]
    pruned(tiny.build(), tiny.calls(1), tmp_path, share=0.5, criterion="l2", repair=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    narrowed = config["quantization_config"]["narrowed"]
    narrowed.pop(name, None)
    narrowed[name] = told
    if "num_groups" in told:
        told |= {"num_channels": 16}
    path.write_text(json.dumps(config))
    with pytest.raises(aerogel.AerogelError, match=message) as error:
        aerogel.load(tmp_path)
    assert "\n" not in str(error.value)


def test_diffusers_is_refused_a_model_without_filters() -> None:
    tiny = FAMILIES["dit"]
    assert isinstance(tiny.build(), diffusers.ModelMixin)
    with pytest.raises(aerogel.AerogelError, match="no filters of convolutions that can leave a block"):
        pruned(tiny.build(), tiny.calls(1))


def judged(module: Any, images_NCHW: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(pixel_values=images_NCHW).logits
    return logits


@pytest.mark.quality
def test_the_judge_of_the_zoo_sees_the_same_with_fewer_filters(tmp_path: Path) -> None:
    """Half of the filters leave a real ResNet: with repair nearly all images are seen as before, and more than without."""
    images = load_file(ZOO / "reference" / "images.safetensors")["images_NCHW"].float() / 127.5 - 1
    calls = [Call((), {"pixel_values": some}) for some in images[1::2].split(16)]
    dense = aerogel.load(ZOO / "fashion-judge", lazy=False, dtype=torch.float32).module
    expected, errors, same = judged(dense, images[::2]), [], []
    for repair in (True, False):
        network = aerogel.load(ZOO / "fashion-judge", lazy=False, dtype=torch.float32)
        folder = tmp_path / str(repair)
        module = pruned(network, calls, folder, share=0.5, repair=repair).network.module  # type: ignore[arg-type]
        logits = judged(module, images[::2])
        errors.append(float((logits - expected).square().mean()))
        same.append(float((logits.argmax(-1) == expected.argmax(-1)).float().mean()))
        assert sum(one.numel() for one in module.parameters()) < 0.75 * sum(one.numel() for one in dense.parameters())
    assert errors[0] < 0.5 * errors[1], errors
    assert same[0] >= 0.9, same
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "True")
    with registered():
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "True").eval()
    ours = aerogel.load(tmp_path / "True", lazy=False).module
    some = images[:8].to(theirs.dtype)
    torch.testing.assert_close(judged(theirs, some), judged(ours, some), rtol=0, atol=2e-4)


def test_registered_diffusers_opens_what_was_saved(tmp_path: Path) -> None:
    tiny = FAMILIES["unet"]
    call = tiny.calls(1)[0]
    pruned(tiny.build(), [call], tmp_path, {"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Conv2d"]}}, share=0.5)
    with registered():
        theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    ours = aerogel.load(tmp_path, lazy=False).module
    torch.testing.assert_close(output(theirs, call), output(ours, call), rtol=0, atol=1e-6)


def test_rounding_behind_it_is_learned(tmp_path: Path) -> None:
    """BRECQ on what is left is closer to the whole model than rounding to nearest, and the folder opens as it was saved."""
    tiny = FAMILIES["unet"]
    calls, whole = tiny.calls(8), tiny.build()
    scheme = {"scheme": "W4A16_CHANNEL", "targets": ["Linear", "Conv2d"]}
    nearest = pruned(tiny.build(), calls, then={"rtn": scheme}, share=0.25).network.module
    learned = pruned(tiny.build(), calls, tmp_path, {"brecq": {**scheme, "steps": 40}}, share=0.25).network.module
    errors = [sum(float((output(module, call) - output(whole, call)).square().sum()) for call in calls) for module in (nearest, learned)]
    assert errors[1] < 0.85 * errors[0], errors
    assert torch.equal(output(aerogel.load(tmp_path, lazy=False).module, calls[0]), output(learned, calls[0]))


def test_a_stopped_run_resumes_with_the_same_bits(tmp_path: Path) -> None:
    calls = [Call((), {"pixel_values": torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))})]
    steps = {"name": "p", "steps": [{"prune_conv_filters": {"share": 0.5}}, {"gptq": {"scheme": "W8A16_CHANNEL"}}]}
    given: dict[str, Any] = {"samples": calls, "measures": ()}
    aerogel.compress(ZOO / "fashion-judge", steps, output=tmp_path / "whole", **given)
    full = mock.patch("aerogel.io.save.write_shards", side_effect=OSError(28, os.strerror(28), "full"))
    with full, pytest.raises(aerogel.AerogelError, match="add --resume to continue"):
        aerogel.compress(ZOO / "fashion-judge", steps, output=tmp_path / "out", **given)
    aerogel.compress(ZOO / "fashion-judge", steps, output=tmp_path / "out", resume=True, **given)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
