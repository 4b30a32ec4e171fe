"""The structure of a model as text: towers, edges of each kind of block, what reads and writes the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """Write out what `structure_of` returned."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['model']} ({found['modality']})" + (f", as found {found['found']}" if "found" in found else "")
    yield from (f"  {tower['name']}: {_several(tower['blocks'], 'block')}" for tower in found["towers"])
    for kind in found["blocks"]:
        yield from _kind(kind)
    residual = found["residual"]
    yield ""
    if isinstance(residual, str):
        yield f"residual stream: cannot be rotated: {residual}"
    else:
        rotations = "any rotation" if residual["rotations"] == "any" else "rotations that keep the mean"
        yield f"residual stream: {residual['width']} wide, {rotations}"
        yield f"  {residual['writers']} layers write it, {residual['readers']} read it through {residual['norms']} norms"
        yield f"  tables: {', '.join(residual['tables'])}"
    if isinstance(time := found["time_path"], str):
        yield f"time path: {time}"
    elif time is not None:
        others = f"; {_some(time['others'])} enters too" if time["others"] else ""
        yield f"time path: {_some(time['embedders'])}, then {_several(len(time['projections']), 'projection')}{others}"
    if found["head"]:
        yield f"head: {found['head']}"
    if found["experts"]:
        yield f"experts: in {_several(len(found['experts']), 'layer')}; kept in 16 bits: {_some(found['kept_in_16_bits'])}"
    if found["not_built"]:
        yield f"kept as it is, the model's class has no module for it: {_some(found['not_built'])}"
    for owner, weights in found["not_reached"].items():
        yield f"not reached by any method: {weights:,} weights of {owner}"


def _kind(kind: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{kind['class']}: {_several(kind['count'], 'block')} like {kind['first']}"
    for edge in kind["edges"]:
        notes = "".join(
            [
                ", modulation" if "modulates" in edge else "",
                f", offset {edge['offset']:g}" if "offset" in edge else "",
                ", squared" if edge.get("power") == 2 else "",
            ]
        )
        yield f"  {' + '.join(edge['from'])} -> {_some(edge['to'])} ({edge['channels']} channels{notes})"
    yield from map(_attention, kind["attention"])
    yield from (f"  loaded as one: {_some(names)}" for names in kind["fused"])
    if not kind["edges"]:
        yield f"  no edges: {next(iter(kind['no_edge_from'].values()), kind['residual'])}"


def _attention(found: dict[str, Any]) -> str:
    shared = f", {found['key_heads']} of keys and values" if found["key_heads"] != found["heads"] else ""
    parts = "; ".join(f"{part} {_some(list(found[part]))}" for part in ("queries", "keys", "values", "outputs"))
    return f"  attention {found['module']}: {found['heads']} heads, {found['head_width']} wide{shared} ({parts})"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _some(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "none"
