"""Fused experts in checkpoints: read one by one, written back fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from aerogel.io.checkpoint import Piece
from aerogel.layers.experts import ExpertList, all_float, fused_parameters, part_of


def pieces(module: nn.Module, name: str, shape: Callable[[], tuple[int, ...]]) -> dict[str, Piece]:
    """Return the parts of a fused parameter of a checkpoint by their names in memory; nothing for any other tensor."""
    home, _, key = name.rpartition(".")
    experts = _list_at(module, home)
    if experts is None or key.removesuffix("_bias") not in (experts.names.first, "down_proj"):
        return {}
    kind, parts = "bias" if key.endswith("_bias") else "weight", experts.names.parts(key)
    found = {}
    for number in range(shape()[0]):
        for turn, part in enumerate(parts):
            found[f"{home}.{number}.{part}.{kind}"] = Piece(number, partial(part_of, turn=turn, of=len(parts), names=experts.names))
    return found


def _list_at(module: nn.Module, name: str) -> ExpertList | None:
    try:
        part = module.get_submodule(name)
    except AttributeError:
        return None
    return part if isinstance(part, ExpertList) else None


def joined(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], always: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on by full name; those of float experts as fused parameters, where checkpoints of the model have these, or `always`.

    The experts of one block are in memory at a time, if they come one block after another. Nothing is passed on from meta.
    """
    whole = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList) and all_float(part)}
    whole = {name: part for name, part in whole.items() if part.names.fused_on_disk or always}
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
