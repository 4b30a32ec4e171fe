"""The discovered structure of a model as plain data: what `aerogel show MODEL` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.layers.experts import ExpertList
from aerogel.model import time_path
from aerogel.model.edges import Edge
from aerogel.model.network import Network
from aerogel.model.structure.moe import routed_experts
from aerogel.model.structure.residual import Residual


def structure_of(network: Network) -> dict[str, Any]:
    """Return what was discovered of a network, and what its family says of the time step, as JSON holds it."""
    blocks = network.blocks()
    kinds: dict[int, list[str]] = {}
    for name in blocks:
        kinds.setdefault(id(network.edges[name]), []).append(name)
    experts = routed_experts(network.module)
    return {
        "model": network.family.name,
        "modality": network.family.modality,
        "towers": [{"name": tower.name, "blocks": len(tower.blocks)} for tower in network.towers],
        "blocks": [_kind(blocks[names[0]], names, network) for names in kinds.values()],
        "experts": list(experts),
        "kept_in_16_bits": sorted(network.gates),
        "head": network.head,
        "residual": _residual(network.residual),
        "time_path": _time_path(network),
        "not_reached": _not_reached(network),
        "not_built": [] if network.unbuilt is None else list(network.unbuilt.parts),
    }


def _kind(block: nn.Module, names: list[str], network: Network) -> dict[str, Any]:
    found = network.edges[names[0]]
    lists = [name for name, part in block.named_modules() if isinstance(part, ExpertList)]
    edges = [_edge(edge, lists) for edge in found.edges]
    return {
        "class": type(block).__name__,
        "first": names[0],
        "count": len(names),
        "edges": _each_once(edges),
        "attention": [
            {key: list(value) if isinstance(value, tuple) else value for key, value in vars(attention).items()}
            for attention in found.attentions
        ],
        "fused": _each_once([_patterns(names, lists) for names in network.fused_sets.get(names[0], ())]),
        "no_edge_from": found.refused,
        "residual": "passes" if found.stream is not None else found.no_stream,
    }


def _each_once(values: list[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def _edge(edge: Edge, lists: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"from": _patterns(edge.sources, lists), "to": _patterns(edge.sinks, lists), "channels": len(edge.rows_C)}
    if edge.offset:
        facts["offset"] = edge.offset
    if edge.added_I is not None:
        facts["modulates"] = True
    return facts | ({"power": edge.power} if edge.power > 1 else {})


def _patterns(names: Sequence[str], lists: list[str]) -> list[str]:
    """Names with `*` for the number of an expert, each once."""
    for home in lists:
        names = [re.sub(rf"^{re.escape(home)}\.\d+\.", f"{home}.*.", name) for name in names]
    return list(dict.fromkeys(names))


def _residual(found: Residual | str) -> dict[str, Any] | str:
    if isinstance(found, str):
        return found
    return {
        "width": found.width,
        "rotations": "keep the mean" if found.keeps_mean else "any",
        "tables": list(found.tables),
        "writers": len(found.writers),
        "readers": len(found.readers),
        "norms": len(found.norms),
    }


def _time_path(network: Network) -> dict[str, Any] | str | None:
    """The path of the time step, or the reason why it is not as the family says; None for a model without one."""
    if network.time is None:
        return None
    try:
        path = time_path.find(network)
    except AerogelError as error:
        return str(error)
    return {"embedders": list(path.embedders), "projections": list(path.projections), "others": list(path.others)}


def _not_reached(network: Network) -> dict[str, int]:
    """Weights of parameters that no method reaches, by the class that owns them."""
    found: dict[str, int] = {}
    for part in network.module.modules():
        if not isinstance(part, Layer | nn.Embedding):
            weights = sum(parameter.numel() for parameter in part.parameters(recurse=False) if parameter.ndim > 1)
            if weights:
                found[type(part).__name__] = found.get(type(part).__name__, 0) + weights
    return found
