"""The discovered structure in a file: a resumed run does not look again, and an output tells what it was compressed by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.engine.resume import write_durably
from aerogel.errors import AerogelError
from aerogel.io.json_files import read_object
from aerogel.model.edges import Edge
from aerogel.model.family import TimePath
from aerogel.model.network import Network
from aerogel.model.structure.attention import Attention
from aerogel.model.structure.edges import BlockEdges
from aerogel.model.structure.residual import Residual
from aerogel.model.structure.stream import BlockStream
from aerogel.model.structure.towers import Tower

FILE = "aerogel.structure.json"
_SCHEMA = 1
_ANEW = "remove it, the structure is found again"


def keep(network: Network, folder: Path) -> None:
    """Write what was discovered of a network into a folder; nothing where that is the towers alone."""
    edges: dict[str, BlockEdges] = network.__dict__.get("edges", {})
    time = network.__dict__.get("time") if network.family.time is None else None
    if not edges and time is None:
        return
    kinds: dict[int, list[str]] = {}
    for block, found in edges.items():
        kinds.setdefault(id(found), []).append(block)
    content = {
        "schema": _SCHEMA,
        "network": key_of(network.module),
        "towers": _plain(network.towers),
        "edges": [{"blocks": blocks, "found": _plain(edges[blocks[0]])} for blocks in kinds.values()],
        "residual": _plain(network.__dict__.get("residual")),
        "time": _plain(time),
    }
    write_durably(folder / FILE, json.dumps(content) + "\n")


def recall(network: Network, folder: Path, compressed: bool = False) -> bool:
    """Take over what `keep` wrote of the same network and return True; nothing where there is no such file or it is of another network.

    A `compressed` network takes over the structure that it had before, by which nothing can be folded any more.
    """
    content = _read(folder)
    with _explained(folder):
        towers = tuple(_made(Tower, tower) for tower in content.get("towers", ()))
        same = towers == network.towers if compressed else content.get("network") == key_of(network.module)
        if not content or not same:
            return False
        found: dict[str, Any] = {"towers": towers}
        if content["edges"]:
            found["edges"] = {block: edges for kind in content["edges"] for edges in [_edges(kind["found"])] for block in kind["blocks"]}
        if (residual := content["residual"]) is not None:
            found["residual"] = residual if isinstance(residual, str) else _made(Residual, residual)
    network.__dict__.update(found)
    recall_time(network, folder)
    return True


def recall_time(network: Network, folder: Path) -> None:
    """Take over the path of the time step: a network that was opened has no calls to find it by where made-up inputs do not run."""
    if (time := _read(folder).get("time")) is not None:
        with _explained(folder):
            network.__dict__["time"] = _made(TimePath, time)


def _read(folder: Path) -> dict[str, Any]:
    """The content of the file; nothing where there is none, or one of another release. Raises AerogelError for a damaged one."""
    path = folder / FILE
    if not path.exists():
        return {}
    content = read_object(path, _ANEW)
    with _explained(folder):
        return content if content["schema"] == _SCHEMA else {}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Raise AerogelError for a file that holds something else than `keep` wrote."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise AerogelError(f"{folder / FILE} is damaged ({type(error).__name__}: {error}); {_ANEW}") from error


def key_of(module: nn.Module) -> str:
    """Return what identifies a network but for the values of its weights: classes, names, shapes and configuration."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name}:{type(part).__module__}.{type(part).__qualname__};".encode())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return f"sha256:{digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """The same as JSON; indices as runs (first, step, count)."""
    if isinstance(value, Tensor):
        return {"runs": _runs(value)}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _runs(index: Tensor) -> list[list[int]]:
    values, runs = index.tolist(), list[list[int]]()
    for value in values:
        first, step, count = runs[-1] if runs else (0, 0, 0)
        if runs and count == 1 and value - first in (0, 1):
            runs[-1] = [first, value - first, 2]
        elif runs and count > 1 and value == first + step * count:
            runs[-1][2] += 1
        else:
            runs.append([value, 0, 1])
    return runs


def _edges(plain: dict[str, Any]) -> BlockEdges:
    known = {field.name for field in dataclasses.fields(BlockEdges)} - {"refused", "stream", "attentions"}
    found = {name: _value(value) for name, value in plain.items() if name in known}
    stream = None if plain["stream"] is None else _made(BlockStream, plain["stream"])
    attentions = tuple(_made(Attention, one) for one in plain["attentions"])
    return BlockEdges(**found | {"edges": list(found["edges"]), "refused": plain["refused"], "stream": stream, "attentions": attentions})


def _made(cls: Any, plain: dict[str, Any]) -> Any:
    return cls(**{name: _value(value) for name, value in plain.items()})


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple(map(_value, plain))
    if not isinstance(plain, dict):
        return plain
    if "runs" in plain:
        runs = [first + step * torch.arange(count) for first, step, count in plain["runs"]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long)
    return _made(Edge, plain)
