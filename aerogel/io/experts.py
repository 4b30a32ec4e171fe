"""Fused experts in checkpoints: read one by one, written back fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from aerogel.io.checkpoint import Piece
from aerogel.layers.experts import ExpertList, all_float, fused_parameters, part_of
from aerogel.model.family import Family

_FUSED = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def pieces(family: Family, name: str, shape: Callable[[], tuple[int, ...]]) -> dict[str, Piece]:
    """Return the parts of a fused parameter of a checkpoint by their names in memory; nothing for any other tensor."""
    names = family.experts
    home, _, key = name.rpartition(".")
    if names is None or not names.fused or not f".{home}".endswith(f".{names.module}") or key not in _FUSED:
        return {}
    kind = "bias" if key.endswith("_bias") else "weight"
    parts = (names.gate, names.up) if key.startswith("gate_up") else (names.down,)
    found = {}
    for number in range(shape()[0]):
        for turn, part in enumerate(parts):
            found[f"{home}.{number}.{part}.{kind}"] = Piece(
                number, partial(part_of, turn=turn, of=len(parts), interleaved=names.interleaved)
            )
    return found


def joined(module: nn.Module, family: Family, tensors: Iterable[tuple[str, Tensor]], always: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on by full name; those of float experts as fused parameters, where checkpoints of the family have these, or `always`.

    The experts of one block are in memory at a time, if they come one block after another. Nothing is passed on from meta.
    """
    whole = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList) and all_float(part)}
    if family.experts is None or not (family.experts.fused or always):
        whole = {}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in whole}
    for name, tensor in tensors:
        home = next((home for home in whole if name.startswith(f"{home}.")), None)
        if home is None:
            yield name, tensor
            continue
        waiting[home][name.removeprefix(f"{home}.")] = tensor
        if len(waiting[home]) == len(whole[home].state_dict()):
            for key, parameter in fused_parameters(waiting.pop(home), whole[home].names).items():
                yield f"{home}.{key}", parameter
