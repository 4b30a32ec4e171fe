"""The discovered structure of a model as plain data: what `aerogel show MODEL` prints."""

from __future__ import annotations

from typing import Any

from torch import nn

from aerogel.layers.conv import Layer
from aerogel.model.edges import Edge
from aerogel.model.network import Network
from aerogel.model.structure.edges import BlockEdges
from aerogel.model.structure.moe import routed_experts
from aerogel.model.structure.residual import Residual


def structure_of(network: Network) -> dict[str, Any]:
    """Return towers, edges and fused sets of each kind of block, experts, head and residual stream of a model, as JSON holds them."""
    blocks = network.blocks()
    kinds: dict[int, list[str]] = {}
    for name in blocks:
        kinds.setdefault(id(network.edges[name]), []).append(name)
    experts = routed_experts(network.module)
    return {
        "model": network.family.name,
        "modality": network.family.modality,
        "towers": [{"name": tower.name, "blocks": len(tower.blocks)} for tower in network.towers],
        "blocks": [_kind(blocks[names[0]], names, network.edges[names[0]]) for names in kinds.values()],
        "experts": list(experts),
        "kept_in_16_bits": sorted(network.gates),
        "head": network.head,
        "residual": _residual(network.residual),
        "not_reached": _not_reached(network),
    }


def _kind(block: nn.Module, names: list[str], found: BlockEdges) -> dict[str, Any]:
    return {
        "class": type(block).__name__,
        "first": names[0],
        "count": len(names),
        "edges": [_edge(edge) for edge in found.edges if not _of_another_expert(edge)],
        "fused": [list(names) for names in found.fused],
        "no_edge_from": found.refused,
        "residual": "passes" if found.stream is not None else found.no_stream,
    }


def _of_another_expert(edge: Edge) -> bool:
    """Return True inside an expert that is not the first of its list: it is like the first."""
    return ".experts." in edge.sources[0] and ".experts.0." not in edge.sources[0]


def _edge(edge: Edge) -> dict[str, Any]:
    facts: dict[str, Any] = {"from": list(edge.sources), "to": list(edge.sinks), "channels": len(edge.rows_C)}
    if edge.offset:
        facts["offset"] = edge.offset
    return facts | ({"power": edge.power} if edge.power > 1 else {})


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


def _not_reached(network: Network) -> dict[str, int]:
    """Weights of parameters that no method reaches, by the class that owns them."""
    found: dict[str, int] = {}
    for part in network.module.modules():
        if not isinstance(part, Layer | nn.Embedding):
            weights = sum(parameter.numel() for parameter in part.parameters(recurse=False) if parameter.ndim > 1)
            if weights:
                found[type(part).__name__] = found.get(type(part).__name__, 0) + weights
    return found
