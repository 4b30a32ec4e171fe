"""Samples out of calls: a block's inputs and what is wanted of it, mixed over all calls into batches of any choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, tensors_in
from aerogel.model.placement import Placement


@dataclass(frozen=True, eq=False)
class _Pair:
    """A call with what is wanted of it, taken apart."""

    leaves: list[Any]
    spec: Any
    size: int
    """Samples; 1 where the call cannot be taken apart because its tokens are not in rows of one batch."""
    whole: bool

    def of_batch(self, position: int) -> bool:
        """Return True where this leaf has a place for each sample."""
        leaf = self.leaves[position]
        return not self.whole and isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.size

    def mixes(self, other: _Pair) -> bool:
        """Return True where samples of both can stand in one batch."""
        if self.whole or other.whole or self.spec != other.spec:
            return self is other
        return all(self._alike(other, position) for position in range(len(self.leaves)))

    def _alike(self, other: _Pair, position: int) -> bool:
        mine, theirs = self.leaves[position], other.leaves[position]
        if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
            return mine is theirs or (type(mine) is type(theirs) and not isinstance(mine, Tensor) and bool(mine == theirs))
        if self.of_batch(position) and other.of_batch(position):
            return mine.shape[1:] == theirs.shape[1:]
        return mine.shape == theirs.shape and torch.equal(mine, theirs)  # the same for all, such as positions


class Samples:
    """The samples of calls by number; raises AerogelError when there is none."""

    def __init__(self, calls: Sequence[Call], outputs: Sequence[Any], placement: Placement | None = None) -> None:
        """`placement` says where batches go to; by default they stay where the calls are."""
        self._placement = placement
        self._pairs = [_pair(call, output) for call, output in zip(calls, outputs, strict=True)]
        if not self._pairs:
            raise AerogelError("no call reached this block: calibrate with calls that do, or leave it out with `ignore`")
        self._kinds: list[int] = []
        for pair in self._pairs:
            known = (kind for kind in dict.fromkeys(self._kinds) if pair.mixes(self._pairs[kind]))
            self._kinds.append(next(known, len(self._kinds)))
        self._places = [(call, sample) for call, pair in enumerate(self._pairs) for sample in range(pair.size)]
        self.power = max(_power(outputs), torch.finfo(torch.float32).tiny)
        """Mean over samples and positions of the squared length of what is wanted, channels summed."""

    def __len__(self) -> int:
        return len(self._places)

    def take(self, numbers: Sequence[int]) -> Iterator[tuple[Call, Any, float]]:
        """Yield (call, what is wanted of it, its share of the samples): one for all samples whose calls mix, several where some do not."""
        places = sorted((self._places[number] for number in numbers), key=lambda place: self._kinds[place[0]])
        for _, group in groupby(places, key=lambda place: self._kinds[place[0]]):
            chosen = [(self._pairs[call], sample) for call, sample in group]
            pair = chosen[0][0]
            leaves = [_gather(chosen, position) for position in range(len(pair.leaves))]
            if self._placement is not None:
                leaves = self._placement.bring(leaves)
            args, kwargs, output = pytree.tree_unflatten(leaves, pair.spec)
            yield Call(args, kwargs), output, len(chosen) / len(numbers)


def reconstruction_error(output: Any, wanted: Any) -> Tensor:
    """Return the squared distance, summed over channels and averaged over the rest, of each pair of tensors; images are (N, C, ...)."""
    pairs = zip(tensors_in(output), tensors_in(wanted), strict=True)
    return torch.stack([(a.float() - b.float()).square().sum(1 if a.ndim == 4 else -1).mean() for a, b in pairs]).sum()


def _pair(call: Call, output: Any) -> _Pair:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs, output))
    first = tensors_in(output)[0]
    whole = first.ndim < 3  # tokens of several samples in a row
    return _Pair(leaves, spec, 1 if whole else len(first), whole)


def _gather(chosen: Sequence[tuple[_Pair, int]], position: int) -> Any:
    pair = chosen[0][0]
    if not pair.of_batch(position):
        return pair.leaves[position]
    return torch.cat([pair.leaves[position][sample : sample + 1] for pair, sample in chosen])


def _power(outputs: Sequence[Any]) -> float:
    tensors = [tensor for output in outputs for tensor in tensors_in(output)]
    powers = [float(tensor.float().square().sum(1 if tensor.ndim == 4 else -1).mean()) for tensor in tensors]
    return sum(powers) / max(len(outputs), 1)
