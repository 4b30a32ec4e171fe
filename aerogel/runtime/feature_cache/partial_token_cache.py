"""Token caching: a module computes some tokens anew and returns the others from its cache; a schedule says how many, attention which.

B batch, H heads, L queries, S keys, N tokens, K of them that are computed anew, D channels, T steps, U modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, normalize, scaled_dot_product_attention

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories, has_step_by_token, latent_of
from aerogel.options import Count, NonNegative, Options, Share
from aerogel.runtime.attention import Attend, attending, attention_received
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.compiled import compiled_around
from aerogel.runtime.feature_cache.schedule import (
    CacheEntry,
    ModuleCache,
    Schedule,
    ScheduleState,
    make_entries,
    patched_entries,
    schedule_state,
)
from aerogel.runtime.feature_cache.streams import tracked

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenCacheState(ScheduleState):
    """A schedule, and what is computed anew at the steps that reuse."""

    shares: Tensor
    """The share of its tokens that a module computes anew (T, U)."""
    scored_by: Mapping[str, str]
    """Full names: module -> the attention that scores its tokens."""


@dataclass(frozen=True)
class TokenCacheConfig(Options):
    """Steps at which all modules run, and the tokens that the steps between compute anew; steps are counted down to 0, the last."""

    interval: Annotated[int, Field(ge=2, le=1_000_000)] = 3
    """About how many steps from one at which all modules run to the next (published: 3 for 50 DDIM steps of DiT, 4 for 250 of DDPM)."""
    pace: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """After step i of T the interval is divided by 1 + pace - 2 x pace x i / T, so it is longest at the start (PixArt: 0.2)."""
    dense: tuple[Share, Share] = (0.2, 0.4)
    """Range of i / T, from the first share up to the second, in which the interval is 2 (PixArt: nowhere)."""
    ratio: NonNegative = 0.07
    """Share of the tokens that the steps between compute anew, before the factors below (PixArt: 0.3)."""
    feed_forward: NonNegative = 2.5
    """Times this in feed-forwards, which get what attention saves (PixArt: 1.6)."""
    cross_attention: NonNegative = 0.0
    """Times this in cross-attention (PixArt: 0.6); self-attention is reused whole."""
    late: float = 0.4
    """At step i the share is multiplied by 1 + late - 2 x late x i / T."""
    front: float = 0.8
    """In block b of those numbered 0 to last it is multiplied by 1 + front - 2 x front x b / last."""
    staleness: NonNegative = 0.25
    """Gain of a token's score for `interval` selections in a row that passed it over; attention received is at most 1."""
    bonus: NonNegative = 0.6
    """The best token of each cell of the image has its score raised by this share of it, so that all of the image is served."""
    cell: Count = 2
    """Rows and columns of a cell, in tokens; 1 for no cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense[0] > self.dense[1]:
            raise AerogelError(f"option 'dense': expected two shares in order, got {list(self.dense)}")

    def ahead(self, steps: int) -> list[int]:
        """For each step how far ahead the next full one is; 0 at a full step."""
        found, left = [], 0
        for index in reversed(range(steps)):
            found.append(left)
            if left == 0:
                dense = int(self.dense[0] * steps) <= index < int(self.dense[1] * steps)
                left = 2 if dense else round(self.interval / (1 + self.pace - 2 * self.pace * index / steps))
            left -= 1
        return found

    def factor(self, kind: str) -> float:
        """The share of the tokens that modules of a kind compute anew, before the factors of step and block."""
        return self.ratio * {"feed-forward": self.feed_forward, "cross-attention": self.cross_attention}.get(kind, 0.0)

    def shares(self, network: Network, partial_T: Tensor) -> Tensor:
        """The share of its tokens that a module computes anew (T, U), at the steps that compute some."""
        modules, steps = cached_modules_of(network).values(), len(partial_T)
        blocks = list(dict.fromkeys(_block(module.name) for module in modules))
        depth_U = torch.tensor([blocks.index(_block(module.name)) for module in modules], dtype=torch.float64) / max(len(blocks) - 1, 1)
        kind_U = torch.tensor([self.factor(module.kind) for module in modules], dtype=torch.float64)
        index_T = torch.arange(steps, dtype=torch.float64).flip(0)
        share_T = (1 + self.late - 2 * self.late * index_T / steps).clamp(min=0) * partial_T
        share_U = kind_U * (1 + self.front - 2 * self.front * depth_U)
        return torch.outer(share_T, share_U).clamp(0, 1)


def raise_best_of_cells(score_BN: Tensor, grid: Grid, cell: int, bonus: float) -> Tensor:
    """Return scores in which the best token of each cell of a frame is worth 1 + bonus times as much; cells at the edge may be cut."""
    plane_F1RC = score_BN.unflatten(1, grid).flatten(0, 1).unsqueeze(1)
    best, place = max_pool2d(plane_F1RC, cell, ceil_mode=True, return_indices=True)
    raised = plane_F1RC.flatten(1).scatter_add(1, place.flatten(1), bonus * best.flatten(1))
    return raised.reshape(score_BN.shape)


def grid_of(latent: Sequence[int], tokens: int) -> Grid:
    """Return the grid of these tokens on a latent (B, C, H, W) or (B, C, frames, H, W) of this shape; raises AerogelError if none fits."""
    frames = latent[2] if len(latent) == 5 else 1
    rows, columns = latent[-2:]
    patch = max(1, math.isqrt(frames * rows * columns // tokens))
    grid = (frames, rows // patch, columns // patch)
    if len(latent) not in (4, 5) or rows % patch or columns % patch or math.prod(grid) != tokens:
        raise AerogelError(
            f"{tokens} tokens are no grid of square patches of a latent of shape {tuple(latent)}, so cells of the image cannot be told; "
            "set cell to 1"
        )
    return grid


def token_cache_state(
    network: Network, trajectories: Trajectories, options: TokenCacheConfig, some: Callable[[int], bool]
) -> TokenCacheState:
    """The state of a policy: a schedule, the shares of tokens by step and module, and the attention that scores each module's tokens.

    `some` says how far ahead the next full step is where some tokens are computed anew. Runs the first call. Raises AerogelError for
    options out of range, for compiled blocks, and where no attention scores the tokens of a module.
    """
    _require_written(network)
    require_step_by_sample(network.module, trajectories.first.args, trajectories.first.kwargs)

    def full(steps: int, modules: int) -> Tensor:
        return torch.tensor(options.ahead(steps)).eq(0)[:, None].expand(-1, modules)

    names = [name for name, module in cached_modules_of(network).items() if options.factor(module.kind)]
    scored_by = _scored_by(network, trajectories.first, names, options.cell) if names else {}
    state = schedule_state(network, trajectories, full)
    partial_T = torch.tensor([ahead > 0 and some(ahead) for ahead in options.ahead(len(state.steps))])
    return TokenCacheState(**vars(state), shares=options.shares(network, partial_T), scored_by=scored_by)


def require_step_by_sample(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise AerogelError where each token has a time step of its own, whose modulation cannot be cut to some tokens."""
    if has_step_by_token(denoiser, args, kwargs):
        raise AerogelError(
            f"{type(denoiser).__name__} is given a time step for each token (expand_timesteps), so that it cannot run on some tokens; a "
            "policy that reuses whole modules (fora) can be had"
        )


def require_scored(network: Network, options: TokenCacheConfig) -> None:
    """Raise AerogelError where the family's data tells that no attention runs over just a module's tokens, or that text is among them."""
    modules = cached_modules_of(network)
    if not any(options.factor(module.kind) for module in modules.values()):
        return
    if joint := [name for name, module in modules.items() if module.kind == "self-attention" and len(module.norms) > 1]:
        raise AerogelError(
            f"{joint[0]} attends to text and image together, and feed-forwards read one of them, so which of their tokens matter cannot be "
            "told; a policy that reuses whole modules (fora) can be had"
        )
    if options.cell > 1 and len(network.family.hidden_state_args) > 1:
        raise AerogelError(
            f"the blocks of this {network.family.name} model read text and image as one row of tokens, so cells of the image cannot be "
            "told; set cell to 1"
        )


@contextmanager
def caching_tokens(network: Network, state: TokenCacheState, options: TokenCacheConfig) -> Iterator[ModuleCache]:
    """Reuse by the state of `token_cache_state` for a while, with some tokens computed anew; afterwards the denoiser is what it was.

    Raises AerogelError for compiled blocks.
    """
    _require_written(network)
    schedule, modules, find = Schedule.of(network, state), cached_modules_of(network), network.module.get_submodule
    readers: dict[str, list[PartialTokenCache]] = {attention: [] for attention in state.scored_by.values()}
    with attending(network, readers, lambda name: partial(_watched, readers[name])):
        entries, answers = make_entries(network, PartialTokenCache)
        for (name, entry), share_T in zip(entries.items(), state.shares.T.tolist(), strict=True):
            entry.prepare(name, options, share_T, schedule)
        for name, attention in state.scored_by.items():
            readers[attention].append(entries[name])
            answers |= {norm: _Norm(norm.forward, entries[name]).__call__ for norm in map(find, modules[name].norms)}
        by = _Recomputing(schedule, entries, network.processor)
        with patched_entries(network.module, entries, answers), tracked(network.module, by):
            yield by


class _Kept(NamedTuple):
    """Cached output of a module, each token as new as it is."""

    made_BND: Tensor
    received_BN: Tensor | None
    """Attention that the tokens received when all were computed, of length 1; None where no token is computed anew before the next time."""
    stale_BN: Tensor | None
    """Selections that passed a token over since it was computed."""


class PartialTokenCache(CacheEntry):
    """A cache entry that can also run its module on some tokens, which are known before the forward, and keep what it has of the others."""

    def __init__(self, own: Callable[..., Any]) -> None:
        super().__init__(own)
        self.scores = False
        """True where all tokens run at this step, and some are chosen before all do again."""
        self.received_BN: Tensor | None = None
        self.index_BK: Tensor | None = None
        """The tokens that run at this step, in order; None where it is all or none."""

    def prepare(self, name: str, options: TokenCacheConfig, shares: Sequence[float], schedule: Schedule) -> None:
        """Take what holds for all steps."""
        self._name, self._options, self._shares = name, options, shares
        self._scores: list[bool] = []
        later = False
        for share, runs in zip(reversed(shares), reversed(schedule.computed_TN[:, schedule.modules.index(name)].tolist()), strict=True):
            self._scores.insert(0, later)
            later = not runs and (later or share > 0)

    def choose(self, latent: Sequence[int]) -> None:
        """Before a forward for a latent of this shape: pick the tokens that run."""
        self.clear()
        self.scores = self.computes and self._scores[self.row]
        if self.computes or not self._shares[self.row]:
            return
        kept, options = self.value, self._options
        self._tokens: int = kept.made_BND.shape[1]
        score_BN = kept.received_BN + options.staleness * kept.stale_BN / options.interval
        if options.cell > 1:
            score_BN = raise_best_of_cells(score_BN, grid_of(latent, self._tokens), options.cell, options.bonus)
        chosen_BK = score_BN.topk(int(self._shares[self.row] * self._tokens), dim=1).indices
        self.index_BK = chosen_BK.sort(dim=1).values  # in order, all tokens may be cut twice: read() sees no difference

    def clear(self) -> None:
        """Let go of everything but the value."""
        self.received_BN = self.index_BK = None

    def read(self, x_BND: Tensor) -> Tensor:
        """The tokens of its input that the module needs at this step; what was cut already, or is a part only, stays as it is."""
        if self.computes:
            return x_BND
        if self.index_BK is None:
            return x_BND[:, :0]
        return x_BND.gather(1, _wide(self.index_BK, x_BND)) if x_BND.shape[1] == self._tokens else x_BND

    def traced(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, on all or some tokens, or do not."""
        if self.index_BK is None:
            return super().traced(*args, **kwargs)
        if self.index_BK.shape[1]:
            x_BND, *others = args
            new_BKD = self.own(self.read(x_BND), *others, **kwargs)
            self.given = self.given.scatter(1, _wide(self.index_BK, new_BKD), new_BKD)
        return self.given

    def close(self) -> None:
        """After the module: keep of its output what later steps want."""
        if self.keeps and self.index_BK is not None:
            kept: _Kept = self.value
            assert kept.stale_BN is not None, "scored when all tokens ran"
            self.value = kept._replace(made_BND=self.given, stale_BN=(kept.stale_BN + 1).scatter(1, self.index_BK, 0))
        super().close()

    def keep(self, made: Any) -> Any:
        """The output, beside what tells its tokens apart where some will be chosen."""
        if not any(self._shares):
            return made
        if not self.scores:
            return _Kept(made, None, None)
        if self.received_BN is None:
            raise AerogelError(
                f"{self._name}: the attention that says which tokens matter did not call scaled_dot_product_attention, as it did when the "
                "policy was calibrated; put this policy on before others that answer for attention"
            )
        return _Kept(made, self.received_BN, torch.zeros_like(self.received_BN))

    def give(self) -> tuple[Any, Any]:
        """The output that is kept."""
        kept = self.value
        return kept.made_BND if isinstance(kept, _Kept) else kept, kept


class _Norm:
    """Stands in for the forward of a norm that only one module reads, and normalises the tokens that it needs."""

    def __init__(self, own: Callable[..., Tensor], entry: PartialTokenCache) -> None:
        self.own, self.entry = own, entry

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise some tokens, all or none."""
        x = self.entry.read(x)
        return self.own(x, *args, **kwargs) if x.shape[1] else x


class _Recomputing(ModuleCache):
    """Lets the cache entries choose tokens, too."""

    entries: Mapping[str, PartialTokenCache]
    _latent: Sequence[int] = ()

    def start(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward."""
        self._latent = latent_of(denoiser, args, kwargs).shape
        super().start(denoiser, args, kwargs)
        require_step_by_sample(denoiser, args, kwargs)

    def begin(self, row: int, memory: Any) -> None:
        """Set the cache entries."""
        super().begin(row, memory)
        for entry in self.entries.values():
            entry.choose(self._latent)

    def drop(self) -> None:
        """Empty the cache entries."""
        super().drop()
        for entry in self.entries.values():
            entry.clear()


def _watched(
    readers: Sequence[PartialTokenCache],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Answer for scaled_dot_product_attention, and tell modules what attention their tokens got where they will need it."""
    waiting = [entry for entry in readers if entry.scores]
    if waiting:
        received_BN = normalize(attention_received(query, key, attn_mask, scale), dim=1)
        for entry in waiting:
            entry.received_BN = received_BN
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _scored_by(network: Network, call: Call, names: Sequence[str], cell: int) -> dict[str, str]:
    """For each of these modules the self-attention beside it that runs over the same tokens."""
    modules, find = cached_modules_of(network), network.module.get_submodule
    attentions = [name for name, module in modules.items() if module.kind == "self-attention"]
    keys: dict[str, int] = {}
    tokens: dict[str, int] = {}

    def seeing(name: str) -> Attend:
        def attend(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            plain = query.shape[:-2] == key.shape[:-2] and not kwargs.get("is_causal")
            keys[name] = key.shape[-2] if plain else 0
            return scaled_dot_product_attention(query, key, *args, **kwargs)

        return attend

    def see(name: str, x_BND: Tensor) -> None:
        tokens[name] = x_BND.shape[1]

    with attending(network, attentions, seeing), capture_inputs({name: find(name) for name in names}, see):
        network.run(call)
    found = {}
    for name in names:
        beside = [other for other in attentions if _block(other) == _block(name) and keys.get(other) == tokens[name]]
        if not beside:
            raise AerogelError(
                f"{name} reads {tokens[name]} tokens, and no self-attention beside it attends to just these through "
                "scaled_dot_product_attention, so which of them matter cannot be told; a policy that reuses whole modules (fora) can be had"
            )
        found[name] = beside[0]
        if cell > 1:
            grid_of(latent_of(network.module, call.args, call.kwargs).shape, tokens[name])
    return found


def _require_written(network: Network) -> None:
    """Raise AerogelError for compiled blocks: the count of tokens changes from step to step, and torch would make graph after graph."""
    around = compiled_around(network.module, cached_modules_of(network))
    if around:
        raise AerogelError(
            f"the {type(next(iter(around))).__name__} around {next(iter(around.values()))[0]} is compiled, and how many tokens run inside "
            "of it changes from step to step: take a denoiser that is not compiled, or a policy that reuses whole modules (fora)"
        )


def _wide(index_BK: Tensor, like_BND: Tensor) -> Tensor:
    return index_BK.unsqueeze(-1).expand(-1, -1, like_BND.shape[-1])


def _block(module: str) -> str:
    return module.rpartition(".")[0]
