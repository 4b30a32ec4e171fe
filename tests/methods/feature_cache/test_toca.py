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
from torch.nn.functional import scaled_dot_product_attention

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.duca import Duca
from aerogel.methods.feature_cache.toca import Toca
from aerogel.model.calls import Call, bytes_in
from aerogel.model.network import Network
from aerogel.numerics.attention import attention
from aerogel.runtime.attention import attending, attention_received
from aerogel.runtime.feature_cache import partial_token_cache
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.partial_token_cache import TokenCacheState, grid_of, raise_best_of_cells
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from tests.runtime.feature_cache.test_replay import painter, recorded
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


def test_runs_do_not_see_each_other() -> None:
    network = opened("dit")
    policy = Toca(**MANY)
    state = policy.calibrate(network, calls("dit", steps=NINE))
    alone = []
    for seed in (0, 9):
        with policy.on(network, state):
            alone.append([output(network.module, call) for call in calls("dit", seed, NINE)])
    one = [Call((), {key: value[:1] for key, value in call.kwargs.items()}) for call in calls("dit", steps=NINE)]
    with policy.on(network, state):
        for seed, wanted in zip((0, 9, 0), [*alone, alone[0]], strict=True):
            assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit", seed, NINE), wanted, strict=True))
            for call in one[:3]:  # a smaller batch, given up half-way
                output(network.module, call)


def test_branches_of_guidance_keep_their_own_tokens() -> None:
    """Rows of a batch as well as branches that come in calls of their own."""
    network, given = opened("dit"), calls("dit", steps=NINE)
    policy = Toca(**MANY)
    state = policy.calibrate(network, given)
    together = run(network, policy, given)
    with policy.on(network, state) as by:
        for call, wanted in zip(given, together, strict=True):
            for place in range(2):
                part = output(network.module, Call((), {key: value[place : place + 1] for key, value in call.kwargs.items()}))
                torch.testing.assert_close(part, wanted[place : place + 1], rtol=1e-4, atol=1e-5)
    assert by.forwards == 18


def test_branches_that_the_pipeline_names_are_told_apart() -> None:
    network, seeds = opened("wan"), (0, 9)
    policy = Duca(**MANY, late=0.4)
    state = policy.calibrate(network, calls("wan", steps=NINE))
    alone = [run(network, policy, calls("wan", seed, NINE)) for seed in seeds]
    with policy.on(network, state):
        for step, pair in enumerate(zip(*(calls("wan", seed, NINE) for seed in seeds), strict=True)):
            for branch, call in enumerate(pair):
                with network.module.cache_context(f"branch of {branch}"):
                    assert torch.equal(output(network.module, call), alone[branch][step])


def test_what_was_given_is_never_written_over() -> None:
    network, given = opened("dit"), calls("dit", steps=NINE)
    policy = Toca(**MANY)
    held: list[tuple[Tensor, Tensor]] = []
    state = policy.calibrate(network, given)
    last = network.module.get_submodule(list(cached_modules_of(network))[-1])
    hook = last.register_forward_hook(lambda _, __, made: held.append((made, made.clone())))
    with policy.on(network, state) as by:
        for row, call in enumerate(given):
            output(network.module, call)
            assert any(by.memories.values()) == (state.computed[row + 1 : row + 2] == ("0000",)), "what is read no more is let go"
    hook.remove()
    assert all(torch.equal(a, b) for a, b in held)
    scores = 2 * 16 * 4
    assert by.peak_bytes == 4 * bytes_in(held[0][0]) + 2 * 2 * scores, "outputs of all modules; attention and age of tokens in two blocks"


def test_a_pipeline_takes_them_from_a_recipe() -> None:
    network = painter()
    given = recorded(network, steps=6)
    made = {}
    steps: dict[str, dict[str, Any]] = {
        "fora": {"interval": 6},
        "toca": {"ratio": 0.4, "dense": [0, 0]},
        "duca": {"ratio": 0.4, "late": 0.0},
    }
    for name, options in steps.items():
        with aerogel.cached(network, {"steps": [{name: options}]}, samples=given):
            images = network.processor(
                class_labels=[0, 7], num_inference_steps=6, generator=torch.Generator().manual_seed(9), output_type="pt"
            ).images
        made[name] = torch.as_tensor(images)
    assert all(images.isfinite().all() for images in made.values())
    assert not torch.equal(made["toca"], made["fora"])
    assert not torch.equal(made["duca"], made["fora"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 1}, "option 'interval': expected a number of at least 2, got 1"),
        ({"cell": 0}, "option 'cell': expected a number of at least 1, got 0"),
        ({"pace": 1.0}, "option 'pace': expected a number from 0 to below 1, got 1.0"),
        ({"dense": (0.4, 0.2)}, r"option 'dense': expected two shares in order, got \[0.4, 0.2\]"),
        ({"ratio": -0.1}, "option 'ratio': expected a number of at least 0, got -0.1"),
    ],
)
def test_knobs_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    for policy in (Toca, Duca):
        with pytest.raises(AerogelError, match=message):
            policy(**options).calibrate(opened("dit"), calls("dit"))


def test_networks_whose_tokens_nothing_scores_are_refused() -> None:
    with pytest.raises(AerogelError, match="names no modules"):
        Toca().calibrate(opened("llama"), calls("dit"))
    network = opened("dit")

    class Written(nn.Module):
        """Attention that calls nothing of torch's."""

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x

    network.module.get_submodule("transformer_blocks.1").attn1 = Written()
    with pytest.raises(AerogelError, match=r"transformer_blocks.1.ff reads 16 tokens, and no self-attention beside it"):
        Toca().calibrate(network, calls("dit"))


def test_compiled_blocks_are_refused() -> None:
    network, given = opened("dit"), calls("dit", steps=NINE)
    state = Toca().calibrate(network, given)
    network.module.get_submodule("transformer_blocks.1").compile(backend="eager")
    for policy in (Toca(), Duca()):
        with pytest.raises(AerogelError, match=r"the BasicTransformerBlock around transformer_blocks.1.attn1 is compiled"):
            policy.calibrate(network, given)
        with pytest.raises(AerogelError, match=r"how many tokens run inside of it changes"), policy.on(network, state):
            pass


def test_an_attention_that_is_answered_elsewhere_is_no_silent_loss() -> None:
    network, given = opened("dit"), calls("dit", steps=NINE)
    policy = Toca(**MANY)
    state = policy.calibrate(network, given)
    name = "transformer_blocks.0.attn1"
    plain = partial(attention, change=lambda _, value: value)
    with (
        attending(network, [name], lambda _: plain),
        policy.on(network, state),
        pytest.raises(AerogelError, match=r"transformer_blocks.0.ff: the attention .* did not call"),
    ):
        output(network.module, given[0])
    assert network.module.get_submodule(name).forward.__self__ is network.module.get_submodule(name)
    with policy.on(network, state), attending(network, [name], lambda _: scaled_dot_product_attention):
        output(network.module, given[0])


def test_tokens_that_are_no_grid_are_refused() -> None:
    assert grid_of((2, 4, 8, 6), 12) == (1, 4, 3)
    assert grid_of((1, 4, 3, 8, 8), 48) == (3, 4, 4)
    for latent, count in (((2, 4, 8, 8), 15), ((2, 16, 64), 16), ((2, 4, 9, 8), 16), ((2, 3, 4, 8, 8), 55)):
        with pytest.raises(AerogelError, match=rf"{count} tokens are no grid .* set cell to 1"):
            grid_of(latent, count)


def test_text_among_the_tokens_needs_no_cells() -> None:
    """Text and video are one row of tokens, and share the norm that runs on each."""
    network, given = opened("cogvideox"), calls("cogvideox", steps=NINE)
    with pytest.raises(AerogelError, match="set cell to 1"):
        Toca().calibrate(network, given)
    policy = Toca(ratio=1.0, feed_forward=1.0, late=0.0, front=0.0, cell=1)
    state = policy.calibrate(network, given)
    whole_TN = Schedule.of(network, state).computed_TN | torch.tensor([False, True] * 2)
    with caching(network, Schedule(state.steps, "", state.modules, whole_TN)):
        wanted = [output(network.module, call) for call in given]
    for a, b in zip(run(network, policy, given), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(run(network, Toca(cell=1), given)[1], wanted[1])
