"""ToCa and DuCa beside a slow literal formula: all tokens run, and only those that score best are written over what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.methods.feature_cache.duca import Duca
from aerogel.methods.feature_cache.toca import Toca
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.attention import attention
from aerogel.runtime.attention import attending, attention_received
from aerogel.runtime.feature_cache import partial_token_cache
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.partial_token_cache import TokenCacheState, raise_best_of_cells
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from tests.runtime.feature_cache.test_schedule import calls
from tests.tiny import opened, output

NINE = tuple(900.0 - 100 * row for row in range(9))
GRIDS = {"dit": (1, 4, 4), "pixart": (1, 4, 4), "wan": (3, 4, 4)}
MANY = {"ratio": 0.15, "cross_attention": 1.0}
"""Enough for several of the tiny networks' tokens."""


def run(network: Network, policy: Toca | Duca, given: Sequence[Call]) -> list[Tensor]:
    with policy.on(network, policy.calibrate(network, given)):
        return [output(network.module, call) for call in given]


def test_full_steps_of_fifty() -> None:
    """Intervals 5, 4, 4, 4, then 3, then 2 from where 19 or fewer are left; index i is 49 minus the step."""
    ahead = Toca().ahead(50)
    full = [row for row, left in enumerate(ahead) if left == 0]
    assert full == [0, 5, 9, 13, 17, 20, 23, 26, 29, 32, 34, 36, 38, 40, 42, 44, 46, 48]
    assert ahead[:10] == [0, 4, 3, 2, 1, 0, 3, 2, 1, 0]
    for row, after in pairwise(full):
        index = 49 - row
        assert after - row == (2 if 10 <= index < 20 else round(3 / (1.4 - 0.8 * index / 50)))
    even = Toca(interval=4, pace=0.0, dense=(0.0, 0.0)).ahead(10)
    assert even == [0, 3, 2, 1, 0, 3, 2, 1, 0, 3]
    assert Toca(interval=4, pace=0.0, dense=(0.0, 1.0)).ahead(5) == [0, 1, 0, 1, 0]


def test_duca_takes_turns() -> None:
    """Tokens run at the step before a full one, at every second step back from there, and at no other."""
    network, given = opened("dit"), calls("dit", steps=NINE)
    options: dict[str, Any] = {"interval": 4, "pace": 0.0, "dense": (0.0, 0.0), "late": 0.0, "front": 0.0, "ratio": 0.1}
    anew = {}
    for policy in (Toca(**options), Duca(**options)):
        state = policy.calibrate(network, given)
        assert state.computed == ("1111", "0000", "0000", "0000") * 2 + ("1111",)
        assert Schedule.of(network, state).reused == pytest.approx(6 / 9)
        torch.testing.assert_close(state.shares.unique(), torch.tensor([0.0, 0.25], dtype=torch.float64))
        assert not state.shares[:, ::2].any(), "attention"
        anew[type(policy)] = state.shares[:, 1].nonzero().flatten().tolist()
    assert anew == {Toca: [1, 2, 3, 5, 6, 7], Duca: [1, 3, 5, 7]}


def test_shares_grow_with_the_steps_and_shrink_with_depth() -> None:
    network = opened("pixart")
    policy = Toca(ratio=0.3, feed_forward=1.6, cross_attention=0.6, late=0.5, front=0.7)
    state = policy.calibrate(network, calls("pixart", steps=NINE))
    for row, left in enumerate(policy.ahead(9)):
        index = 8 - row
        for place, (name, module) in enumerate(cached_modules_of(network).items()):
            depth = int(name.split(".")[1])
            kind = {"feed-forward": 1.6, "cross-attention": 0.6, "self-attention": 0.0}[module.kind]
            wanted = 0.3 * kind * (1.5 - index / 9) * (1.7 - 1.4 * depth) if left else 0.0
            assert float(state.shares[row, place]) == pytest.approx(min(wanted, 1.0))
    late = Duca(ratio=1.0, late=10.0, front=2.0).calibrate(network, calls("pixart", steps=NINE)).shares
    assert late[[6, 8]].max() == 1
    assert late.min() == 0
    assert not late[3].any(), "two factors below 0 are no share above it"


@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_attention_received_is_the_map_summed_over_queries(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)
    allowed = torch.rand(2, 1, 7, 5) > 0.3
    allowed[..., 0] = True
    mask = {"no": None, "bool": allowed, "float": torch.randn(1, 5)}[masked]
    bias = torch.zeros(()) if mask is None else mask if masked == "float" else torch.where(allowed, 0.0, -torch.inf)
    for scale in (None, 0.3):
        probabilities = (query @ key.mT * (scale or 0.5) + bias).softmax(-1)
        for limit in (1, 2 * 3 * 5 * 3, 2**20):  # one query at a time, three, all
            monkeypatch.setattr("aerogel.runtime.attention.CHUNK_SCORES", limit)
            torch.testing.assert_close(attention_received(query, key, mask, scale), probabilities.mean(1).sum(1))


@pytest.mark.parametrize("cell", [2, 3])
def test_the_best_of_each_cell_is_raised(cell: int) -> None:
    torch.manual_seed(0)
    score = torch.rand(2, 2 * 4 * 5)
    found = raise_best_of_cells(score, (2, 4, 5), cell, 0.6)
    torch.testing.assert_close(found, raised(score, (2, 4, 5), cell, 0.6))
    assert int((found > score).sum()) == 2 * 2 * 2 * (3 if cell == 2 else 2)


def raised(score: Tensor, grid: tuple[int, int, int], cell: int, bonus: float) -> Tensor:
    """Cell by cell."""
    made = score.clone().view(-1, *grid[1:])
    for frame in made:
        for row in range(0, grid[1], cell):
            for column in range(0, grid[2], cell):
                part = frame[row : row + cell, column : column + cell]
                best = divmod(int(part.argmax()), part.shape[1])
                part[best] *= 1 + bonus
    return made.view(score.shape)


class Literal:
    """Hooks on modules that all run: what they give is written over what is kept token by token."""

    def __init__(self, network: Network, policy: Toca | Duca, state: TokenCacheState, grid: tuple[int, int, int]) -> None:
        self.policy, self.state, self.grid, self.row = policy, state, grid, 0
        self.maps: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.stale: dict[str, Tensor] = {}
        self.counts: list[int] = []

    def see(self, name: str, operand: str, value: Tensor) -> Tensor:
        if operand == "probabilities":
            self.maps[name.rpartition(".")[0]] = value
        return value

    def replace(self, name: str, place: int, made: Tensor) -> Tensor:
        if self.state.computed[self.row][place] == "1":
            total = self.maps[name.rpartition(".")[0]].mean(1).sum(1)
            self.kept[name], self.scores[name] = made.clone(), total / total.square().sum(1, keepdim=True).sqrt()
            self.stale[name] = torch.zeros_like(total)
        elif share := float(self.state.shares[self.row, place]):
            score = self.scores[name] + self.policy.staleness * self.stale[name] / self.policy.interval
            score = raised(score, self.grid, self.policy.cell, self.policy.bonus)
            self.stale[name] += 1
            now, count = self.kept[name].clone(), int(share * made.shape[1])
            self.counts.append(count)
            for sample in range(len(made)):
                for token in score[sample].argsort(descending=True)[:count].tolist():
                    now[sample, token] = made[sample, token]
                    self.stale[name][sample, token] = 0
            self.kept[name] = now
        return self.kept[name]


def literal(network: Network, policy: Toca | Duca, given: Sequence[Call], grid: tuple[int, int, int]) -> tuple[list[Tensor], list[int]]:
    """What the formula answers, and how many tokens it took at each step and module that takes some."""
    at = Literal(network, policy, policy.calibrate(network, given), grid)
    answers = []
    own = [name for name, module in cached_modules_of(network).items() if module.kind == "self-attention"]
    with ExitStack() as stack:
        stack.enter_context(attending(network, own, lambda name: partial(attention, change=partial(at.see, name))))
        for place, name in enumerate(cached_modules_of(network)):
            hook = lambda _, __, made, name=name, place=place: at.replace(name, place, made)  # noqa: E731
            stack.callback(network.module.get_submodule(name).register_forward_hook(hook).remove)
        for row, call in enumerate(given):
            at.row = row
            answers.append(output(network.module, call))
    return answers, at.counts


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "policy", [Toca(**MANY), Duca(**MANY, late=0.4), Toca(**MANY, staleness=2.0, cell=3)], ids=["toca", "duca", "stale"]
)
def test_tokens_are_those_of_the_formula(name: str, policy: Toca | Duca) -> None:
    network, given = opened(name), calls(name, steps=NINE)
    wanted, counts = literal(network, policy, given, GRIDS[name])
    assert 0 < max(counts) < GRIDS[name][0] * 16
    state = policy.calibrate(network, given)
    with counted(network) as ran, policy.on(network, state):
        found = [output(network.module, call) for call in given]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with caching(network, Schedule.of(network, state)):
        without = [output(network.module, call) for call in given]
    assert max(float((a - b).abs().max()) for a, b in zip(found, without, strict=True)) > 0.01, "the tokens matter"
    rows = [count for count, every in ran if count < every]
    assert rows == [count for count in counts if count]
    full = policy.ahead(9).count(0)
    assert len(ran) - len(rows) == full * sum(module.kind != "self-attention" for module in cached_modules_of(network).values())


@contextmanager
def counted(network: Network) -> Iterator[list[tuple[int, int]]]:
    """(tokens, tokens of the image) of what goes into the first linear of each cross-attention and feed-forward."""
    ran: list[tuple[int, int]] = []
    every = {"wan": 48}.get(network.family.name, 16)
    with ExitStack() as stack:
        for name, module in cached_modules_of(network).items():
            if module.kind != "self-attention":
                first = next(part for part in network.module.get_submodule(name).modules() if isinstance(part, nn.Linear))
                stack.callback(first.register_forward_pre_hook(lambda _, args: ran.append((args[0].shape[1], every))).remove)
        yield ran


@pytest.mark.parametrize("name", GRIDS)
def test_norms_normalise_what_is_read(name: str) -> None:
    """All tokens at full steps, the chosen ones at others, none where nothing is chosen."""
    network, given = opened(name), calls(name, steps=NINE)
    policy, every = Duca(ratio=0.2, late=0.4, front=0.0), GRIDS[name][0] * 16
    state = policy.calibrate(network, given)
    norms = {
        norm: place
        for place, module in enumerate(cached_modules_of(network).values())
        if module.kind == "feed-forward"
        for norm in module.norms
    }
    seen: dict[str, int] = {}
    with ExitStack() as stack:
        for norm in norms:
            keep = lambda _, __, made, norm=norm: seen.update({norm: made.shape[1]})  # noqa: E731
            stack.callback(network.module.get_submodule(norm).register_forward_hook(keep).remove)
        stack.enter_context(policy.on(network, state))
        for row, call in enumerate(given):
            output(network.module, call)
            for norm, place in norms.items():
                share = 1.0 if state.computed[row][place] == "1" else float(state.shares[row, place])
                assert seen[norm] == int(share * every)


@pytest.mark.parametrize("name", [*GRIDS, "unet"])
def test_all_tokens_are_the_whole_feed_forward(name: str) -> None:
    network, given = opened(name), calls(name, steps=NINE)
    policy = Toca(ratio=1.0, feed_forward=1.0, late=0.0, front=0.0)
    state = policy.calibrate(network, given)
    whole_TN = Schedule.of(network, state).computed_TN | torch.tensor(
        [module.kind == "feed-forward" for module in cached_modules_of(network).values()]
    )
    with caching(network, Schedule(state.steps, "", state.modules, whole_TN)):
        wanted = [output(network.module, call) for call in given]
    for a, b in zip(run(network, policy, given), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [Toca, Duca])
def test_without_tokens_it_is_plain_reuse(policy: type[Toca | Duca]) -> None:
    network, given = opened("dit"), calls("dit", steps=NINE)
    for ratio in (0.0, 0.001):  # the second is less than a token
        state = policy(ratio=ratio).calibrate(network, given)
        with caching(network, Schedule.of(network, state)):
            wanted = [output(network.module, call) for call in given]
        assert all(torch.equal(a, b) for a, b in zip(run(network, policy(ratio=ratio), given), wanted, strict=True))
    assert Toca(ratio=0.0).calibrate(network, given).scored_by == {}


@pytest.mark.parametrize("name", GRIDS)
def test_what_goes_on_comes_off(name: str) -> None:
    network, given = opened(name), calls(name, steps=NINE)
    policy = Toca(**MANY)
    state = policy.calibrate(network, given)
    before = {part: dict(module.__dict__) for part, module in network.module.named_modules()}
    wanted = [output(network.module, call) for call in given]
    with policy.on(network, state):
        for call in given[:2]:  # given up half-way
            output(network.module, call)
    assert {part: module.__dict__.keys() for part, module in network.module.named_modules()} == {
        part: kept.keys() for part, kept in before.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.module.modules())
    assert all(torch.equal(output(network.module, call), a) for call, a in zip(given, wanted, strict=True))


def test_maps_are_summed_only_where_tokens_are_chosen_later(monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = opened("dit"), calls("dit", steps=NINE)
    sums: list[Tensor] = []

    def spy(*args: Any) -> Tensor:
        sums.append(attention_received(*args))
        return sums[-1]

    def summed(state: TokenCacheState) -> list[int]:
        made = []
        with policy.on(network, state):
            for call in given:
                sums.clear()
                output(network.module, call)
                made.append(len(sums))
        return made

    monkeypatch.setattr(partial_token_cache, "attention_received", spy)
    policy = Duca(ratio=0.2)
    state = policy.calibrate(network, given)
    assert state.computed == tuple("1111" if full else "0000" for full in (1, 0, 0, 0, 1, 0, 0, 1, 0))
    assert state.shares[:, 1].ne(0).tolist() == [False, False, False, True, False, False, True, False, True]
    assert summed(state) == [2, 0, 0, 0, 2, 0, 0, 2, 0]
    late = replace(state, shares=state.shares.where(torch.arange(9)[:, None] > 6, 0.0))
    assert summed(late) == [0, 0, 0, 0, 0, 0, 0, 2, 0]
