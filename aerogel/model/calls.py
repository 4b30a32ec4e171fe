"""A call is one forward of a network as (args, kwargs); below this line nobody knows the modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aerogel.model.denoisers import entries
from aerogel.model.hooks import temporary_hooks


@dataclass(frozen=True)
class Call:
    """The arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The same call with every tensor changed."""
        args, kwargs = map_tensors(change, (self.args, self.kwargs))
        return Call(args, kwargs)

    @property
    def shape(self) -> str:
        """The call's structure, with its switches but without its tensors: calls of one shape take one route through a network."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return f"{[leaf if isinstance(leaf, bool | str) else type(leaf).__name__ for leaf in leaves]}{spec}"


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply `change` to every tensor in nested tuples, lists, dicts and model outputs."""
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and model outputs."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def bytes_in(tree: Any) -> int:
    """The bytes of memory that the tensors of a tree keep: a view keeps all of what it is a view of, and what two share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(tree))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def record(module: nn.Module, runs: Iterable[Callable[[], object]]) -> list[Call]:
    """Watch real generations and keep every call that `module` gets, with copies of its tensors on the host.

    Several denoisers are watched one by one, each call names its own. A tensor equal to the last call's in the same place is kept once,
    such as the text of a denoiser's steps.
    """
    calls: list[Call] = []

    def keeping(more: dict[str, Any]) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_copied(Call(args, kwargs | more), calls[-1] if calls else None))

        return keep

    with temporary_hooks([part.register_forward_pre_hook(keeping(more), with_kwargs=True) for part, more in entries(module)]):
        for run in runs:
            run()
    return calls


def _copied(call: Call, before: Call | None) -> Call:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    last, last_spec = pytree.tree_flatten((before.args, before.kwargs)) if before else ([], None)
    kept = [_kept(leaf, last[place] if last_spec == spec else None) for place, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(kept, spec)
    return Call(args, kwargs)


def _kept(leaf: Any, old: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # A copy even where it is on the host already: pipelines write into their tensors.
    copied = leaf.detach().to("cpu", copy=True)
    alike = isinstance(old, torch.Tensor) and (old.shape, old.dtype) == (copied.shape, copied.dtype)
    return old if alike and torch.equal(old, copied) else copied
