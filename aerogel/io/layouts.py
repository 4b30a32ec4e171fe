"""Tensors that checkpoints hold otherwise than modules: experts are fused there, weights of Conv1D are (inputs, outputs), words padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from aerogel.io.checkpoint import Piece
from aerogel.io.packed_words import repacked
from aerogel.layers.experts import ExpertList, all_float, fused_parameters, part_of
from aerogel.layers.linear import QuantLinear
from aerogel.layers.transposed import TransposedLinear


def pieces(module: nn.Module, padded: bool, name: str, shape: Callable[[], tuple[int, ...]]) -> dict[str, Piece]:
    """Return what becomes of a tensor of a checkpoint, by names in memory; nothing for one that is the same there.

    `padded` says that words of integer codes are those of before compressed-tensors 0.18.
    """
    home, _, key = name.rpartition(".")
    if padded and isinstance(layer := _at(module, home), QuantLinear):
        return repacked(name, layer.scheme, layer.out_features, layer.in_features)
    if key == "weight" and isinstance(_at(module, home), TransposedLinear):
        return {name: Piece(slice(None), Tensor.t)}
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
    part = _at(module, name)
    return part if isinstance(part, ExpertList) else None


def _at(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def as_on_disk(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], always: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on by full name, as checkpoints hold them; float experts as fused parameters where these do so, or `always`.

    The experts of one block are in memory at a time, if they come one block after another. Nothing is passed on from meta.
    """
    whole = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList) and all_float(part)}
    whole = {name: part for name, part in whole.items() if part.names.fused_on_disk or always}
    turned = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, TransposedLinear)}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in whole}
    for name, tensor in tensors:
        home = next((home for home in whole if name.startswith(f"{home}.")), None)
        if home is None:
            yield name, tensor.t().contiguous() if name in turned else tensor
            continue
        waiting[home][name.removeprefix(f"{home}.")] = tensor
        if len(waiting[home]) == len(whole[home].state_dict()):
            for key, parameter in fused_parameters(waiting.pop(home), whole[home].names).items():
                yield f"{home}.{key}", parameter
