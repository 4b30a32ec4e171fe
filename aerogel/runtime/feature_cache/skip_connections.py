"""Denoisers whose inner blocks are skipped at some steps: what these gave when they ran last enters the outer blocks again.

A denoiser with skip connections goes down and up again. All that the blocks outside of a skip read of those inside is what the last of
these gives, so one cache entry is enough however many blocks are skipped; and what is handed across inside is read by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.model.calls import Call, tensors_in
from aerogel.model.family import Skips
from aerogel.model.network import Network
from aerogel.model.trace import trace
from aerogel.model.trajectories import Trajectories, step_of
from aerogel.runtime.feature_cache.block_cache import BlockCacheState
from aerogel.runtime.feature_cache.compiled import called, patch_compiled
from aerogel.runtime.feature_cache.streams import StreamTracker, tracked

_CLOSE = 1e-2
"""Largest relative distance between two answers that ought to be the same; half precision needs that much."""
_CROSSED = (
    "the blocks inside of this skip connection cannot be skipped, because the denoiser reads more of them than what the last gives (as "
    "with residuals of a ControlNet or an adapter, or with blocks of another kind)"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class SkipState(BlockCacheState):
    """The blocks inside of a skip connection, and the steps at which they run."""

    inner: tuple[str, ...]
    """Full names, in the order in which they run."""
    whole: str
    """A 1 for each step at which all blocks run, a 0 for each at which the inner ones rest."""


class SkipConnectionCache(StreamTracker):
    """Follows the forwards of a denoiser and runs its inner blocks, or lets them rest."""

    def __init__(self, network: Network, state: SkipState) -> None:
        super().__init__(state.steps, state.sampler, network.processor, state.precision)
        self._whole, self._giver = state.whole, state.inner[-1]
        self._tuples: dict[str, bool] = {}
        """True where a block's output is a tuple."""
        self.decisions: list[tuple[int, bool]] = []
        """(step, whether all blocks ran) of each forward."""
        self.drop()

    def drop(self) -> None:
        """Let go of the forward at hand."""
        self._row, self._rests, self._keeps = 0, False, False
        self._feature: Any = None

    def begin(self, row: int, memory: Any) -> None:
        """A feature is remembered for a step that rests; without one all blocks run."""
        self._row, self._feature, self._rests = row, memory, memory is not None
        self._keeps = self._whole[row + 1 : row + 2] == "0"

    def end(self) -> Any:
        """The feature, if the next step wants it."""
        feature = self._feature if self._keeps else None
        self.decisions.append((self._row, not self._rests))
        self.drop()
        return feature

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward; raises AerogelError where it brings residuals for blocks that may be skipped."""
        made = super().start(denoiser, args, kwargs)
        given = dict(zip(arguments_of(denoiser), args, strict=False)) | kwargs
        if brought := [name for name in given if "residual" in name and given[name] is not None]:
            raise AerogelError(f"{_CROSSED}: this call brings {brought[0]}; take a policy that reuses modules (fora, harmonica) for it")
        return made

    def block(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return an inner block's output."""
        if not self._rests:
            made = forward(*args, **kwargs)
            self._tuples[name] = isinstance(made, tuple)
            if name == self._giver and self._keeps:
                self._feature = made
            return made
        if name == self._giver:
            return self._feature
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        nothing = x[:, :0]  # without channels the network can still count and join it, and pays nothing for that
        return (nothing,) if self._tuples[name] else nothing


def skips_of(network: Network) -> Skips:
    """The skip connections of the network's family; raises AerogelError for a family without them."""
    if network.family.skips is None:
        raise AerogelError(
            f"the {network.family.name} family names no skip connections (skips in aerogel/families); policies that skip the blocks inside "
            "of one need them, those that reuse modules (fora, harmonica) do not"
        )
    return network.family.skips


def skip_state(network: Network, trajectories: Trajectories, branch: int, whole: str) -> SkipState:
    """Return the state of a policy that lets the blocks inside of a skip rest; `whole` has a 1 for each step that runs all blocks.

    Skips are counted from 0, the outermost. One recorded call proves that these blocks can be left out: with what they gave at the same
    step the others have to answer the same. Raises AerogelError for a family without skips, and where there is no such skip.
    """
    skips_of(network)
    state = SkipState(
        steps=trajectories.steps,
        sampler=trajectories.sampler,
        precision=trajectories.precision,
        blocks=len(network.blocks()),
        inner=tuple(inner(network, trajectories.first, branch)),
        whole=whole,
    )
    _prove(network, trajectories.first, state)
    return state


def inner(network: Network, call: Call, branch: int) -> list[str]:
    """The blocks inside of a skip, in the order in which they run: from the one that reads it first to the one before it is read again."""
    skips = skips_of(network)
    order = list(trace(network, [call], lambda _: nullcontext()).order)
    given, read = (sorted({*order} & {*network.named(*globs)}, key=order.index) for globs in (skips.given, skips.read))
    if len(read) - len(given) not in (0, 1):  # one more where nothing lies inside of the innermost
        raise AerogelError(f"{len(given)} blocks hand their input across, but {len(read)} read it: these skip connections are not known")
    if not 0 <= branch < len(given):
        raise AerogelError(
            f"branch {branch} is none of this denoiser's {len(given)} skip connections with blocks inside: 0 to {len(given) - 1}"
        )
    return order[order.index(given[branch]) : order.index(read[-1 - branch])]


def _prove(network: Network, call: Call, state: SkipState) -> None:
    step = step_of(network.module, call.args, call.kwargs)
    with caching_inner_blocks(network, replace(state, steps=(step, step), whole="10")) as by, by.named("proof"):
        wanted = tensors_in(network.run(call))[0]
        try:
            given = tensors_in(network.run(call))[0]
        except (AssertionError, RuntimeError) as error:
            raise AerogelError(f"{_CROSSED}: without them it fails ({error})") from error
    assert by.decisions == [(0, True), (1, False)], "the second forward is the one without them"
    apart, norm = (given - wanted).float().norm(), wanted.float().norm()
    if not apart <= _CLOSE * norm:
        raise AerogelError(f"{_CROSSED}: without them it answers otherwise, by {float(apart):.2g} where the norm is {float(norm):.2g}")


@contextmanager
def caching_inner_blocks(network: Network, state: SkipState) -> Iterator[SkipConnectionCache]:
    """Skip inner blocks for a while at the steps that a state says; then the denoiser is what it was.

    Raises AerogelError when the state is of a network with other blocks.
    """
    blocks = network.blocks()
    unknown = [name for name in state.inner if name not in blocks]
    if unknown or state.blocks != len(blocks):
        raise AerogelError(
            f"the policy was made for {state.blocks} blocks, this denoiser has {len(blocks)}"
            + (f"; {unknown[0]} is none of them" if unknown else "")
        )
    by = SkipConnectionCache(network, state)
    answers: dict[nn.Module, Callable[..., Any]] = {blocks[name]: partial(by.block, name, called(blocks[name])) for name in state.inner}
    with patch_compiled(network.module, answers), tracked(network.module, by):
        yield by
