"""Reuse on blocks that were compiled: they answer like eager ones, graphs hold what runs, and few are made.

Graphs are counted by a compiler of our own, which runs them as they were traced; one test goes through torch's, down to machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aerogel.errors import AerogelError
from aerogel.kernels import onepass
from aerogel.model.hooks import uncompiled
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.block_cache import TableRule, caching_blocks
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, costs_of
from aerogel.runtime.feature_cache.compiled import called, patch_compiled
from aerogel.runtime.feature_cache.schedule import CacheEntry, Schedule, caching
from aerogel.runtime.feature_cache.taylor import TaylorSeries
from tests.runtime.feature_cache.test_block_cache import AT, DEPTH, _Odd, deep
from tests.runtime.feature_cache.test_schedule import calls, scattered, table
from tests.tiny import FAMILIES, fill, opened, output


class Graphs:
    """A compiler that counts what it is given, and the linear layers that run."""

    def __init__(self) -> None:
        self.made, self.ran = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        self.made += 1
        linears = sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            self.ran += linears
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def single(name: str) -> Network:
    """A tiny network of one block."""
    whole = FAMILIES[name].build()
    torch.manual_seed(0)
    module = type(whole).from_config(dict(whole.config) | {"num_layers": 1}).float().eval()  # type: ignore[attr-defined]
    fill(module, torch.Generator().manual_seed(0))
    return Network(module.requires_grad_(False), opened(name).family)


def compiled(network: Network) -> Graphs:
    """The graphs of a network whose blocks are compiled from now on."""
    graphs = Graphs()
    for block in network.blocks().values():
        block.compile(fullgraph=True, backend=graphs)
    return graphs


class Linears(TorchFunctionMode):
    """Counts the linear layers that run eagerly inside of some modules."""

    def __init__(self) -> None:
        super().__init__()
        self.ran, self.inside = 0, False

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += self.inside and function is torch._C._nn.linear
        return function(*args, **kwargs or {})


@contextmanager
def linears(modules: Iterable[nn.Module]) -> Iterator[Linears]:
    counter = Linears()
    hooks = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(lambda *_: setattr(counter, "inside", True))]
        hooks += [module.register_forward_hook(lambda *_: setattr(counter, "inside", False))]
    with counter:
        yield counter
    for hook in hooks:
        hook.remove()


def answers(network: Network, name: str, steps: Sequence[float] | None = None) -> list[Tensor]:
    return [output(network.module, call) for call in (calls(name) if steps is None else calls(name, steps=steps))]


def close(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(given, wanted, strict=True))


def patterns(network: Network, schedule: Schedule) -> set[tuple[bool, ...]]:
    """What the modules of a block do at a step, all that come up."""
    rows = [[True] * len(schedule.modules), *schedule.computed_TN[1:].tolist()]
    places = [[place for place, module in enumerate(schedule.modules) if module.startswith(f"{name}.")] for name in network.blocks()]
    return {tuple(row[place] for place in inside) for row in rows for inside in places}


@pytest.mark.parametrize("name", ["dit", pytest.param("flux", marks=pytest.mark.slow)])
def test_compiled_blocks_answer_like_eager_ones(name: str) -> None:
    network = opened(name)
    schedule = table(network, scattered(network))
    plain = answers(network, name)
    with linears(network.blocks().values()) as ran, caching(network, schedule):
        wanted = answers(network, name)
    graphs = compiled(network)
    before = answers(network, name)
    assert close(before, plain)
    shapes, graphs.ran = graphs.made, 0
    with caching(network, schedule):
        given = answers(network, name)
    assert close(given, wanted)
    assert graphs.ran == ran.ran, "what is reused is in no graph that runs"
    made = graphs.made
    assert made - shapes <= len(patterns(network, schedule)) * shapes
    for _ in range(2):
        with caching(network, schedule):
            assert close([*answers(network, name), *answers(network, name)], [*wanted, *wanted])
    assert all(torch.equal(a, b) for a, b in zip(answers(network, name), before, strict=True))
    assert graphs.made == made, "neither steps nor runs nor putting on and taking off make new ones"


def test_patterns_take_nothing_of_the_limit_of_shapes() -> None:
    network = single("wan")
    graphs = compiled(network)
    rows = list(product([True, False], repeat=3))
    steps = [900.0 - 100 * place for place in range(len(rows))]
    answers(network, "wan")
    assert torch._dynamo.config.recompile_limit == 8
    with caching(network, table(network, torch.tensor(rows), steps)):
        answers(network, "wan", steps)
    assert graphs.made == 1 + 8
    call = calls("wan")[0].map(lambda given: given[..., :6] if given.ndim == 5 else given)
    assert output(network.module, call).isfinite().all()
    assert graphs.made == 1 + 8 + 1, "there is room for another shape"


def test_machine_code_answers_like_eager_blocks() -> None:
    if not onepass.works():
        pytest.skip("no C++ compiler was found, or its code failed a trial")
    network = single("dit")
    halves_TN = torch.ones(4, 2, dtype=torch.bool)
    halves_TN[[1, 3]] = False
    schedule = table(network, halves_TN)
    with caching(network, schedule):
        wanted = answers(network, "dit")
    for block in network.blocks().values():
        block.compile(fullgraph=True)
    with caching(network, schedule):
        assert close(answers(network, "dit"), wanted)
    with caching(network, schedule, store="float8"):
        assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(answers(network, "dit"), wanted, strict=True))


def test_slots_that_reckon_do_so_outside() -> None:
    network = single("dit")
    fewer_TN = torch.ones(6, 2, dtype=torch.bool)
    fewer_TN[[2, 4, 5]] = False
    steps = [900.0 - 100 * place for place in range(6)]
    schedule, make = table(network, fewer_TN, steps), partial(TaylorSeries, order=2)
    with caching(network, schedule, make):
        wanted = answers(network, "dit", steps)
    graphs = compiled(network)
    with caching(network, schedule, make) as reuse:
        given = answers(network, "dit", steps)
    assert close(given, wanted)
    assert graphs.made == 2, "modules run or do not"
    assert reuse.computed == 6


class _Own(CacheEntry):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def test_slots_that_run_in_a_way_of_their_own_are_refused() -> None:
    network = opened("dit")
    compiled(network)
    with pytest.raises(AerogelError, match="runs parts of modules"), caching(network, table(network, scattered(network)), _Own):
        pass


def test_units_that_were_compiled_by_themselves() -> None:
    network = opened("dit")
    schedule = table(network, scattered(network))
    modules = [network.module.get_submodule(name) for name in cached_modules_of(network)]
    with linears(modules) as ran, caching(network, schedule):
        wanted = answers(network, "dit")
    graphs = Graphs()
    for module in modules:
        module.compile(fullgraph=True, backend=graphs)
    with caching(network, schedule):
        assert close(answers(network, "dit"), wanted)
    assert graphs.ran == ran.ran > 0
    assert graphs.made == 2, "of attention and of feed-forward"


def test_a_forward_that_somebody_else_put_there_stays() -> None:
    network = opened("dit")
    schedule = table(network, scattered(network))
    with caching(network, schedule):
        wanted = answers(network, "dit")
    for block in network.blocks().values():
        block.forward = partial(block.forward)  # type: ignore[method-assign]
    before = [block.forward for block in network.blocks().values()]
    compiled(network)
    with caching(network, schedule):
        assert close(answers(network, "dit"), wanted)
    assert [block.forward for block in network.blocks().values()] == before


def test_what_goes_on_comes_off() -> None:
    network = opened("wan")
    graphs = Graphs()
    network.module.compile_repeated_blocks(fullgraph=True, backend=graphs)  # type: ignore[operator]
    before = {part: dict(module.__dict__) for part, module in network.module.named_modules()}
    with caching(network, table(network, scattered(network))):
        answers(network, "wan")
    assert graphs.made
    after = {part: dict(module.__dict__) for part, module in network.module.named_modules()}
    assert before.keys() == after.keys()
    for part, kept in before.items():
        assert kept.keys() == after[part].keys()
        assert all(after[part][key] is value for key, value in kept.items())
    assert not any(module._forward_pre_hooks for module in network.module.modules())


def test_stretches_of_compiled_blocks_are_left_out() -> None:
    network = deep("dit")
    rule = partial(TableRule, ((1, DEPTH),), [None, 0, None, 0])
    with linears(network.blocks().values()) as ran, caching_blocks(network, AT, rule):
        wanted = answers(network, "dit")
    graphs = compiled(network)
    answers(network, "dit")
    made, graphs.ran = graphs.made, 0
    with caching_blocks(network, AT, rule):
        given = answers(network, "dit")
    assert close(given, wanted)
    assert graphs.ran == ran.ran > 0
    assert graphs.made == made


def test_a_rule_that_sees_what_the_first_unit_reads_runs_one_block_eagerly() -> None:
    network = deep("dit")
    _, *others = network.blocks().values()
    with linears(others) as ran, caching_blocks(network, AT, lambda: _Odd([])):
        wanted = answers(network, "dit")
    graphs = compiled(network)
    seen: list[Tensor] = []
    with caching_blocks(network, AT, lambda: _Odd(seen)):
        given = answers(network, "dit")
    assert close(given, wanted)
    assert len(seen) == 4
    assert graphs.ran == ran.ran > 0
    before = graphs.ran
    answers(network, "dit")
    assert graphs.ran - before == 2 * before // (DEPTH - 1) * DEPTH, "afterwards all blocks are compiled ones again"


@pytest.mark.parametrize("policy", ["modules", "block_ranges"])
def test_a_denoiser_that_is_compiled_as_a_whole_is_refused(policy: str) -> None:
    network = deep("dit") if policy == "block_ranges" else opened("dit")
    graphs = Graphs()
    network.module.compile(backend=graphs)
    with pytest.raises(AerogelError, match="DiTTransformer2DModel is compiled as a whole"), _on(network, policy):
        pass
    assert not graphs.made, "nothing is compiled to find its blocks"


@pytest.mark.parametrize("policy", ["modules", "block_ranges"])
def test_blocks_that_are_compiled_meanwhile_are_refused(policy: str) -> None:
    network = deep("dit") if policy == "block_ranges" else opened("dit")
    with _on(network, policy):
        output(network.module, calls("dit")[0])
        compiled(network)
        with pytest.raises(AerogelError, match="compile them first, then put the cache on"):
            output(network.module, calls("dit")[1])
    answers(network, "dit")
    with _on(network, policy):
        compiled(network)  # once more
        with pytest.raises(AerogelError, match="compile them first, then put the cache on"):
            output(network.module, calls("dit")[0])


def test_blocks_that_are_compiled_with_what_holds_them_cannot_be_left_out() -> None:
    network = deep("dit")
    network.module.get_submodule("transformer_blocks").compile()
    with pytest.raises(AerogelError, match="ModuleList is compiled with the blocks in it"), _on(network, "block_ranges"):
        pass


def _on(network: Network, policy: str) -> Any:
    if policy == "modules":
        return caching(network, table(network, scattered(network)))
    return caching_blocks(network, AT, partial(TableRule, ((1, DEPTH),), [None, 0, None, 0]))


def test_a_policy_on_another_is_no_compilation() -> None:
    network = deep("dit")
    graphs = compiled(network)
    with _on(network, "block_ranges"):
        wanted = answers(network, "dit")
    with _on(network, "block_ranges"):
        outer: dict[nn.Module, Any] = {block: called(block) for block in network.blocks().values()}
        with patch_compiled(network.module, outer):
            assert close(answers(network, "dit"), wanted)
    assert graphs.made


def test_compiled_blocks_can_be_watched_as_they_are_written() -> None:
    network = opened("dit")
    wanted = costs_of(network, calls("dit")[0])
    graphs = compiled(network)
    with uncompiled(network.module):
        assert costs_of(network, calls("dit")[0]) == wanted
    assert graphs.made == 0
    answers(network, "dit")
    assert graphs.made > 0
