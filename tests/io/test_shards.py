"""Safetensors written as a stream: read back by the library itself."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.shards import write_shards

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


def everything() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randint(0, 2, (3, i + 1)).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"fp8": torch.randn(5).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    return tensors | {"strided": torch.randn(6, 4).T}


def test_every_dtype_and_shape_comes_back_aligned(tmp_path: Path) -> None:
    tensors = everything()
    checksums = write_shards(tmp_path, tensors.items())
    path = tmp_path / "model.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert checksums == {"model.safetensors": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8)), name
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % tensors[name].element_size() == 0 for name, entry in header.items() if name != "__metadata__")


def test_shards_are_named_counted_indexed_and_no_larger_than_asked(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(7)} | {"large": torch.randn(50, 50)}
    checksums = write_shards(tmp_path, tensors.items(), "diffusion_pytorch_model", max_shard_size=1000)
    assert list(checksums) == [f"diffusion_pytorch_model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.get_tensor(name).equal(tensors[name])
    assert len(list(tmp_path.iterdir())) == len(checksums) + 1


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(8):
            gc.collect()
            # The one before is still bound to the loop that consumes this.
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.full((100,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"t{number}", tensor
            del tensor

    write_shards(tmp_path, stream(), max_shard_size=10**6)
    assert len(alive) == 8


def test_a_name_given_twice_and_nothing_at_all_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="'a' was given twice"):
        write_shards(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(AerogelError, match="no tensors"):
        write_shards(tmp_path, [])
