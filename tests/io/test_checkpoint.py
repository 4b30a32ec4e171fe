"""Checkpoint: what is on disk is what comes back, damage is named, and released memory is really given back."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Checkpoint


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "blocks.0.weight": torch.randn(4, 4, generator=generator).bfloat16(),
        "blocks.0.bias": torch.randn(4, generator=generator).bfloat16(),
        "blocks.1.weight": torch.randn(4, 4, generator=generator).bfloat16(),
        "blocks.1.bias": torch.randn(4, generator=generator).bfloat16(),
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards and an index."""
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed = nn.Embedding(6, 4, dtype=dtype)
            self.blocks = nn.ModuleList(nn.Linear(4, 4, dtype=dtype) for _ in range(2))


def test_tensors_come_back_as_they_were_written(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.bytes() == 2 * (24 + 16 + 4 + 16 + 4)
    assert checkpoint.main_dtype() == torch.bfloat16


@pytest.mark.parametrize("file", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_single_file_needs_no_index(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / file)
    assert Checkpoint.open(tmp_path).tensor("a").tolist() == [1.0, 1.0, 1.0]


def test_names_in_memory_may_differ_from_names_on_disk(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(folder, rename=lambda name: name.replace("blocks.", "layers."))
    assert "layers.0.weight" in checkpoint
    assert "blocks.0.weight" not in checkpoint
    assert checkpoint.on_disk("layers.0.weight") == "blocks.0.weight"
    assert torch.equal(checkpoint.tensor("layers.1.bias"), tensors["blocks.1.bias"])


def _remove(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _cut_inside_the_header(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _empty(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def _garble(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[9:13] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))


def _replace_with_other_tensors(folder: Path) -> None:
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_remove, "missing"),
        (_cut, "truncated"),
        (_cut_inside_the_header, "truncated"),
        (_empty, "truncated"),
        (_garble, "corrupt"),
        (_replace_with_other_tensors, "blocks.1"),
    ],
)
def test_damage_is_one_line_that_names_the_file(folder: Path, damage, complaint: str) -> None:
    damage(folder)
    checkpoint = Checkpoint.open(folder)
    for attempt in (checkpoint.verify, lambda: checkpoint.tensor("blocks.1.weight")):
        with pytest.raises(AerogelError, match=rf"model-00002-of-00002\.safetensors.*{complaint}") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_not_called_damage(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(AerogelError, match=r"model\.safetensors: holds tensors of dtype F4"):
        Checkpoint.open(tmp_path)


def test_a_broken_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(AerogelError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(AerogelError, match="own folder"):
        Checkpoint.open(folder)


def test_pickles_are_refused_and_empty_folders_explained(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AerogelError, match=r"pytorch_model\.bin.*only safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    if dtype == torch.float8_e4m3fn and value == float("inf"):
        value = float("nan")  # this format has no infinity
    bad = torch.ones(3, 5)
    bad[2, 4] = value
    save_file(
        {"good": torch.ones(3).to(dtype), "bad": bad.to(dtype), "count": torch.ones(2, dtype=torch.int32)}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.nonfinite() == ["bad"]
    assert checkpoint.nonfinite(["good", "count"]) == []


def test_a_block_is_filled_and_sent_back(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    net, checkpoint = Net(), Checkpoint.open(folder)
    checkpoint.materialise(net.blocks[1], "blocks.1")
    assert torch.equal(net.blocks[1].weight, tensors["blocks.1.weight"])
    assert isinstance(net.blocks[1].weight, nn.Parameter)
    assert net.blocks[0].weight.is_meta
    assert net.embed.weight.is_meta
    checkpoint.release(net.blocks[1])
    assert net.blocks[1].weight.is_meta
    assert net.blocks[1].weight.shape == (4, 4)


def test_skipped_parts_stay_on_meta(folder: Path) -> None:
    net = Net()
    Checkpoint.open(folder).materialise(net, skip=[net.blocks[0]])
    assert [name for name, parameter in net.named_parameters() if parameter.is_meta] == ["blocks.0.weight", "blocks.0.bias"]


def test_floats_take_the_dtype_asked_for_or_that_of_the_slot(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    net = Net(torch.float32)
    checkpoint = Checkpoint.open(folder)
    checkpoint.materialise(net.blocks[0], "blocks.0")
    checkpoint.materialise(net.blocks[1], "blocks.1", torch.float64)
    assert torch.equal(net.blocks[0].weight, tensors["blocks.0.weight"].float())
    assert torch.equal(net.blocks[1].weight, tensors["blocks.1.weight"].double())


def test_what_is_in_memory_is_not_read_again(folder: Path) -> None:
    net, checkpoint = Net(), Checkpoint.open(folder)
    checkpoint.materialise(net)
    with torch.no_grad():
        net.blocks[0].weight.fill_(7)
    checkpoint.materialise(net)
    assert (net.blocks[0].weight == 7).all()


@pytest.mark.parametrize("stored_as", ["embed.weight", "head.weight"])
def test_tied_weights_stay_tied_whichever_name_is_on_disk(tmp_path: Path, stored_as: str) -> None:
    save_file({stored_as: torch.arange(24.0).reshape(6, 4)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embed"].weight
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.materialise(net)
    assert net["head"].weight is net["embed"].weight
    assert net["head"].weight[5, 3] == 23
    checkpoint.release(net)
    assert net["head"].weight is net["embed"].weight


def test_only_persistent_buffers_come_from_disk(tmp_path: Path) -> None:
    save_file(
        {"running_mean": torch.full((4,), 3.0), "running_var": torch.ones(4), "num_batches_tracked": torch.tensor(5)},
        tmp_path / "model.safetensors",
    )
    norm = nn.BatchNorm1d(4, affine=False)
    norm.register_buffer("table", torch.arange(4.0), persistent=False)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.release(norm)
    assert norm.running_mean.is_meta
    checkpoint.materialise(norm)
    assert norm.running_mean.tolist() == [3.0] * 4
    assert int(norm.num_batches_tracked) == 5
    assert norm.table.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("tensor", "found", "expected"),
    [(torch.ones(4, 5), r"\[4, 5\]", r"\[4, 4\]"), (torch.ones(4, 4, dtype=torch.int8), "torch.int8", "torch.float32")],
)
def test_a_tensor_of_another_model_is_refused(tmp_path: Path, tensor: torch.Tensor, found: str, expected: str) -> None:
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(AerogelError, match=rf"weight is {found}, the model expects {expected}"):
        Checkpoint.open(tmp_path).materialise(nn.Linear(4, 4, bias=False, device="meta"))
    with pytest.raises(AerogelError, match="no tensor 'bias'"):
        Checkpoint.open(tmp_path).materialise(nn.Linear(5, 4, device="meta"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    """A block of 128 MB in tensors of 1 MB, which the C library would keep; in a process of its own, where nothing else is freed."""
    save_file({f"{number}.weight": torch.ones(512, 512) for number in range(128)}, tmp_path / "model.safetensors")
    script = f"""
        import torch
        from torch import nn
        from aerogel.io.checkpoint import Checkpoint

        def resident():
            return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

        with torch.device("meta"):
            block = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(128))
        checkpoint = Checkpoint.open({str(tmp_path)!r})
        checkpoint.verify()
        checkpoint.materialise(block), checkpoint.release(block)  # libraries that are loaded at first use
        before = resident()
        checkpoint.materialise(block)
        full = resident()
        result = torch.ones(1000)  # lies above the block in the heap, as what was made of it does
        checkpoint.release(block)
        print(full - before, resident() - before)
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    taken, kept = map(float, answer.stdout.split())
    assert 120 < taken < 200
    assert kept < 8
