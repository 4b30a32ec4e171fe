"""Outputs of finished blocks, call by call: in memory, or in a folder as memory-mapped safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from aerogel.errors import AerogelError
from aerogel.model.calls import map_tensors, tensors_in
from aerogel.model.placement import Placement


class Activations:
    """Outputs by block and call, on the host; with a folder they live on disk and outlast the process.

    A faded output has only its shape left: it answers with zeros, for glue that computes what nobody reads.
    """

    def __init__(self, folder: Path | None = None, placement: Placement | None = None) -> None:
        """`placement` says where outputs are computed with; the host by default."""
        self._folder = folder
        self._placement = placement or Placement()
        self._held: dict[tuple[str, int], Any] = {}
        self._faded: dict[tuple[str, int], Any] = {}
        """Outputs on disk of which only the shape is left: a walk asks for all of them again and again."""
        self._zeros: dict[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, int]] = {}
        """For each shape the zeros that faded outputs answer with, and the version at which they were zeros."""

    def put(self, block: str, call: int, output: Any) -> None:
        """Store the output of a block for a call."""
        output = self._placement.take_back(output)
        self._faded.pop((block, call), None)
        if self._folder is None:
            self._held[block, call] = output
        else:
            _write(self._path(block, call), output)

    def get(self, block: str, call: int, part: Callable[[Any], Any] = lambda output: output) -> Any:
        """Return a copy of the output of a block for a call, or of a `part` of it, where it is computed with.

        Raises KeyError when the call did not reach the block.
        """
        return map_tensors(self._copied, part(self._look(block, call)))

    def fade(self, block: str, calls: int) -> None:
        """Drop the outputs of a block for calls 0 to `calls`, except their shapes."""
        for call in range(calls):
            try:
                output = self._look(block, call)
            except KeyError:
                continue
            if not _is_faded(output):
                self.put(block, call, map_tensors(lambda tensor: tensor.to("meta"), output))

    def _look(self, block: str, call: int) -> Any:
        if self._folder is None:
            return self._held[block, call]
        if (block, call) in self._faded:
            return self._faded[block, call]
        path = self._path(block, call)
        if not path.exists():
            raise KeyError((block, call))
        output = _read(path)
        if _is_faded(output):
            self._faded[block, call] = output
        return output

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return self._zeros_like(tensor)
        return tensor.to(self._placement.device, copy=True)

    def _zeros_like(self, faded: torch.Tensor) -> torch.Tensor:
        """Return zeros, the same tensor as before unless somebody wrote to it: one for every block would take longer than all glue."""
        if torch.is_inference_mode_enabled():  # nobody counts what is written to
            return torch.zeros(faded.shape, dtype=faded.dtype, device=self._placement.device)
        zeros, version = self._zeros.get((faded.shape, faded.dtype), (faded, -1))
        if zeros._version != version:
            zeros = torch.zeros(faded.shape, dtype=faded.dtype, device=self._placement.device)
            self._zeros[faded.shape, faded.dtype] = zeros, zeros._version
        return zeros

    def _path(self, block: str, call: int) -> Path:
        assert self._folder is not None
        return self._folder / block / f"{call}.safetensors"


def _is_faded(output: Any) -> bool:
    return all(tensor.is_meta for tensor in tensors_in(output))


def _write(path: Path, output: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    structure = _take_apart(output, tensors)
    beside = path.with_suffix(".new")
    save_file(tensors, beside, metadata={"structure": json.dumps(structure)})
    with beside.open("rb") as written:
        os.fsync(written.fileno())
    beside.replace(path)


def _read(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        try:
            structure = json.loads(file.metadata()["structure"])
            return _put_together(structure, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise AerogelError(f"{path} is damaged; remove the progress folder to start again") from error


def _take_apart(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The structure of an output as JSON; its tensors are put into `tensors` under the numbers that the structure names."""
    if isinstance(tree, torch.Tensor) and tree.is_meta:
        return {"shape": [list(tree.shape), str(tree.dtype).removeprefix("torch.")]}
    if isinstance(tree, torch.Tensor):
        key = str(len(tensors))
        # Its order in memory decides which kernel reads it, and with it the last bits of what comes out; files know one order only.
        strides = tree.stride()
        order = sorted(range(tree.ndim), key=lambda dimension: -strides[dimension])
        # Separate storage: safetensors refuses tensors that share memory.
        tensors[key] = tree.detach().permute(order).clone(memory_format=torch.contiguous_format)
        return {"tensor": [key, order]}
    if isinstance(tree, dict):
        return {"dict": {key: _take_apart(value, tensors) for key, value in tree.items()}}
    if isinstance(tree, tuple | list):
        return {type(tree).__name__ if type(tree) in (tuple, list) else "tuple": [_take_apart(value, tensors) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"a block gave a {type(tree).__name__}, which cannot be kept on disk")


def _put_together(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        key, order = content
        return tensors[key].permute(sorted(range(len(order)), key=order.__getitem__))
    if kind == "shape":
        return torch.empty(content[0], dtype=getattr(torch, content[1]), device="meta")
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _put_together(value, tensors) for key, value in content.items()}
    values = [_put_together(value, tensors) for value in content]
    return tuple(values) if kind == "tuple" else values
