"""FasterCache: attention that follows its last change and an unconditional half that is made of the other, beside written-out formulas."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.errors import AerogelError
from aerogel.methods.diffusion.temporal_cache import TemporalCache
from aerogel.methods.feature_cache.fastercache import Fastercache, attention_runs, bands, both_run
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded
from tests.runtime.feature_cache.test_schedule import calls, counted
from tests.tiny import opened, output

TEN = tuple(900.0 - 100 * place for place in range(10))
NAMES = ["dit", "pixart", "wan", "unet", "sd3", "cogvideox"]
SECOND = Fastercache(conditional="second")


def paired(name: str, steps: Sequence[float] = TEN, first: int = 0, second: int = 4) -> list[Call]:
    """A generation with both branches of guidance in one batch: the same sample twice, with two conditions."""
    made = []
    for one, other in zip(calls(name, 0, steps), calls(name, 4, steps), strict=True):
        ends = {first: one.kwargs, second: other.kwargs}
        key = next(iter(one.kwargs))
        pair = {
            name: torch.cat([ends[first][name][:1], ends[second][name][:1]]) if isinstance(value, Tensor) else value
            for name, value in one.kwargs.items()
        }
        made.append(Call((), pair | {key: one.kwargs[key][:1].repeat_interleave(2, dim=0)}))
    return made


def answers(network: Network, policy: Fastercache, given: Sequence[Call]) -> list[Tensor]:
    with policy.on(network, policy.calibrate(network, given)):
        return [output(network.module, call) for call in given]


def table(policy: Fastercache, network: Network, given: Sequence[Call]) -> list[str]:
    """What runs at each step: the halves, then the modules."""
    state = policy.calibrate(network, given)
    return [both + row for both, row in zip(state.both, state.computed, strict=True)]


def half_of(call: Call) -> Call:
    """The second half of a paired call."""
    return call.map(lambda tensor: tensor[1:])


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bands as they are published: of the shifted spectrum, a disc in the middle and what is around it."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    y, z = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    disc = y**2 + z**2 <= (min(height, width) // 5) ** 2
    return spectrum * disc, spectrum * ~disc


class Literal:
    """Nothing is left out: attention always runs, and its output is thrown away where the formula gives another."""

    def __init__(self, network: Network, policy: Fastercache, steps: Sequence[float], weights: Sequence[float]) -> None:
        self.network, self.policy, self.steps, self.weights = network, policy, steps, weights
        self.last: dict[str, list[Any]] = {}
        self.row, self.alone = 0, False
        self.low = self.high = torch.empty(0)

    def attention(self, name: str, made: Any) -> Any:
        policy, step, last = self.policy, self.steps[self.row], self.last.setdefault(name, [])
        parts = made if isinstance(made, tuple) else (made,)
        size = len(parts[0])
        fits = size == 1 or all(len(kept[0]) == size for kept in last[-2:])
        if policy.window[0] < step < policy.window[1] and self.row % policy.self_every and fits:
            newest = [part[-size:] for part in last[-1]]
            oldest = [part[-size:] for part in last[-2:][0]]
            parts = tuple(a + self.weights[self.row] * (a - b) for a, b in zip(newest, oldest, strict=True))
        else:
            last.append(parts)
        return parts if isinstance(made, tuple) else parts[0]

    def forward(self, call: Call) -> Tensor:
        policy, step = self.policy, self.steps[self.row]
        first, last = policy.unconditional_window
        if not (first < step < last and self.row % policy.unconditional_every):
            made = output(self.network.module, call)
            if policy.unconditional_every == 1:
                return made
            (low, high), (other_low, other_high) = split(made[:1]), split(made[1:])
            self.low, self.high = low - other_low, high - other_high
            return made
        conditional = output(self.network.module, half_of(call))
        self.low = self.low * (policy.low if policy.low_window[0] < step < policy.low_window[1] else 1)
        self.high = self.high * (policy.high if policy.high_window[0] < step < policy.high_window[1] else 1)
        low, high = split(conditional)
        spectrum = low + self.low + high + self.high
        return torch.cat([torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real, conditional])

    def run(self, given: Sequence[Call]) -> list[Tensor]:
        hooks = [
            self.network.module.get_submodule(name).register_forward_hook(lambda _, __, made, name=name: self.attention(name, made))
            for name, module in cached_modules_of(self.network).items()
            if module.kind == "self-attention"
        ]
        made = []
        for self.row, call in enumerate(given):
            made.append(self.forward(call))
        for hook in hooks:
            hook.remove()
        return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"self_every": 3, "unconditional_every": 2, "window": (-1.0, 1000.0), "unconditional_window": (150.0, 1000.0), "weight_first": 0.8,
         "weight_last": 0.8, "low": 1.3, "high": 0.7},
        {"self_every": 1, "unconditional_every": 9, "unconditional_window": (-1.0, 1000.0)},
    ],
    ids=["published", "other options", "guidance alone"],
)  # fmt: skip
def test_answers_are_those_of_the_formula(name: str, options: dict[str, Any]) -> None:
    network, given = opened(name), paired(name)
    policy = Fastercache(conditional="second", **options)
    wanted = Literal(network, policy, TEN, [policy.weight_first] * 10).run(given)
    found = answers(network, policy, given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    left_out = [place for place, row in enumerate(table(policy, network, given)) if "0" in row]
    plain = [output(network.module, call) for call in given]
    assert left_out == [place for place in range(10) if not torch.allclose(found[place], plain[place], atol=1e-2)]


def test_bands_are_those_of_a_sum_over_waves() -> None:
    """10 x 13: frequencies at most 2 from zero are low."""
    torch.manual_seed(0)
    x = torch.randn(10, 13)
    low = torch.zeros(10, 13, dtype=torch.complex128)
    for u in range(-2, 3):
        for v in range(-2, 3):
            if u * u + v * v <= 4:
                wave = torch.tensor([[cmath.exp(2j * cmath.pi * (u * i / 10 + v * j / 13)) for j in range(13)] for i in range(10)])
                low += (x * wave.conj()).sum() / 130 * wave
    found, rest = bands(x)
    torch.testing.assert_close(found, low.real.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found + rest, x)
    assert torch.equal(bands(torch.ones(3, 4, 4))[0], torch.ones(3, 4, 4)), "below five pixels the mean alone is low"


@pytest.mark.parametrize(
    ("every", "window", "run"), [(5, (-1.0, 641.0), "1110010000"), (2, (150.0, 650.0), "1110101011"), (1, (-1.0, 1000.0), "1111111111")]
)
def test_both_halves_run_at_these_steps(every: int, window: tuple[float, float], run: str) -> None:
    assert "".join("01"[one] for one in both_run(TEN, every, window)) == run


@pytest.mark.parametrize(
    ("both", "every", "window", "run"),
    [
        ("1111111111", 2, (-1.0, 681.0), "1110101010"),
        ("1110010000", 2, (-1.0, 681.0), "1110111010"),  # step 5 has both halves, step 4 had one
        ("1010101010", 3, (-1.0, 1000.0), "1001101001"),  # not at 4, since step 3 had one half
        ("1111111111", 3, (250.0, 550.0), "1111001111"),
        ("1000000000", 1, (-1.0, 1000.0), "1111111111"),
    ],
)
def test_attention_runs_at_these_steps(both: str, every: int, window: tuple[float, float], run: str) -> None:
    assert "".join("01"[one] for one in attention_runs(TEN, [one == "1" for one in both], every, window)) == run


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_does_not_run(name: str) -> None:
    network, given = opened(name), paired(name)
    state = SECOND.calibrate(network, given)
    samples: list[int] = []
    layer = next(part for part in network.module.modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d))
    hook = layer.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))
    output(network.module, given[0])
    both = samples[0]
    with SECOND.on(network, state), counted(network) as ran:
        for call in given:
            samples.clear()
            ran.clear()
            row = TEN.index(float(call.kwargs["timestep"].flatten()[0]))
            output(network.module, call)
            assert samples[0] == both // (1 if state.both[row] == "1" else 2)
            assert len(ran) == state.computed[row].count("1")
    hook.remove()
    assert state.both == "1110010000"
    attentions = sum(module.kind == "self-attention" for module in cached_modules_of(network).values())
    assert [row.count("0") for row in state.computed] == [0, 0, 0, attentions, 0, 0, 0, attentions, 0, attentions]


def test_either_half_may_have_the_condition() -> None:
    network = opened("pixart")
    wanted = answers(network, SECOND, paired("pixart"))
    turned = [call.map(lambda tensor: tensor.flip(0)) for call in paired("pixart")]
    found = answers(network, Fastercache(conditional="first"), turned)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.flip(0), b, rtol=1e-5, atol=1e-5)


def test_a_recorded_generation_shows_which_half_has_the_condition() -> None:
    """DiT's pipeline gives it first; with both halves of each call exchanged the same generation replays too."""
    network = dit_pipeline()
    given = recorded(network)
    assert Fastercache().calibrate(network, given).conditional == "first"
    turned = [Call(call.args, call.kwargs | {"class_labels": call.kwargs["class_labels"].roll(2)}) for call in given]
    with torch.no_grad():
        assert Fastercache().calibrate(network, turned).conditional == "second"
    with pytest.raises(AerogelError, match="came without its pipeline"):
        Fastercache().calibrate(opened("dit"), paired("dit"))


def test_a_pipeline_runs_with_half_the_samples() -> None:
    network = dit_pipeline()
    seen: list[int] = []
    step = {"fastercache": {"unconditional_window": [-1.0, 500.0], "unconditional_every": 3}}
    with aerogel.cached(network, {"steps": [step]}, samples=recorded(network)) as found:
        assert found[0].state.both == "11010"
        hook = network.module.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))  # type: ignore[union-attr, index]
        made = [paint(network, seed) for seed in (9, 9)]
        hook.remove()
    assert seen == [4, 4, 2, 4, 2] * 2
    assert torch.equal(*made)
    plain = paint(network, 9)
    assert 0 < (made[0] - plain).norm() / plain.norm() < 0.1


def paint(network: Network, seed: int) -> Tensor:
    made = network.processor(class_labels=[0, 7], num_inference_steps=5, generator=torch.Generator().manual_seed(seed), output_type="pt")
    return torch.as_tensor(made.images)


def test_attention_alone_needs_no_guidance() -> None:
    """Branches in calls of their own each have their own last outputs, and the weight of the change rises from step to step."""
    network = opened("wan")
    policy = Fastercache(unconditional_every=1, window=(-1.0, 1000.0), weight_first=0.0, weight_last=1.0)
    alone = [calls("wan", seed, TEN) for seed in (0, 4)]
    state = policy.calibrate(network, alone[0])
    assert state.both == "1" * 10
    assert state.conditional == ""
    rising = [(row - 1) / 8 for row in range(10)]
    wanted = [Literal(network, policy, TEN, rising).run(given) for given in alone]
    with policy.on(network, state):
        for row, pair in enumerate(zip(*alone, strict=True)):
            for branch, call in enumerate(pair):
                torch.testing.assert_close(output(network.module, call), wanted[branch][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["table", "cache"])
def test_tables_by_the_step_see_the_half_that_runs(first: str) -> None:
    network, given = opened("pixart"), paired("pixart")
    wanted = answers(network, SECOND, given)
    table = TemporalCache(content="path")
    policies = {"table": (table, table.calibrate(network, given)), "cache": (SECOND, SECOND.calibrate(network, given))}
    (one, its_state), (other, other_state) = (policies[name] for name in sorted(policies, reverse=first == "table"))
    with one.on(network, its_state), other.on(network, other_state):
        found = [output(network.module, call) for call in given]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() / b.norm() < 0.05, "a table of halves differs a little"


def test_two_bands_of_one_half_are_held_as_long_as_they_are_needed() -> None:
    network, given = opened("pixart"), paired("pixart")
    policy = Fastercache(self_every=1, conditional="second", unconditional_window=(150.0, 641.0))
    held = []
    with policy.on(network, policy.calibrate(network, given)) as cache:
        for call in given:
            image = output(network.module, call)[0]
            held.append(sum(map(cache.held_bytes, cache.memories.values())))
    assert held == [2 * image.nbytes * (step in (2, 3, 5, 6)) for step in range(10)], "steps 3, 4, 6 and 7 are guessed"
    assert cache.peak_bytes == 2 * image.nbytes


def test_what_goes_on_comes_off_and_runs_do_not_see_each_other() -> None:
    network, given = opened("pixart"), paired("pixart")
    before = [output(network.module, call) for call in given]
    parts = {name: set(module.__dict__) for name, module in network.module.named_modules()}
    state = SECOND.calibrate(network, given)
    with SECOND.on(network, state):
        wanted = [output(network.module, call) for call in given]
        for call in given[:5]:  # given up half-way
            output(network.module, call)
        broken = given[5].kwargs | {"encoder_hidden_states": torch.ones(2, 7, 3)}
        with pytest.raises(RuntimeError):
            network.module(**broken)
        assert all(torch.equal(output(network.module, call), a) for call, a in zip(given, wanted, strict=True))
        whole = [call.map(lambda tensor: tensor.repeat_interleave(2, dim=0)) for call in given]  # two images
        for call, a in zip(whole, wanted, strict=True):
            torch.testing.assert_close(output(network.module, call), a.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-5)
    assert {name: set(module.__dict__) for name, module in network.module.named_modules()} == parts
    assert not network.module._forward_hooks
    assert not network.module._forward_pre_hooks
    assert all(torch.equal(output(network.module, call), a) for call, a in zip(given, before, strict=True))


def test_a_run_without_guidance_is_refused() -> None:
    network, given = opened("dit"), paired("dit")
    with SECOND.on(network, SECOND.calibrate(network, given)):
        with pytest.raises(AerogelError, match="the batch of 2 samples is not the same samples twice, but this cache was made for both"):
            output(network.module, calls("dit", steps=TEN)[0])
        with pytest.raises(AerogelError, match="the batch of 1 samples"):
            output(network.module, half_of(given[0]))
        output(network.module, given[0])
        with pytest.raises(AerogelError, match="time step 600 is not the 800 that comes at step 2"):
            output(network.module, given[3])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, calls("wan"), r"recorded batch of 1 samples is not .* in calls of their own.*set unconditional_every to 1"),
        ({}, calls("dit"), "recorded batch of 2 samples is not the same samples twice"),
        ({"self_every": 0}, [], "option 'self_every': expected a number from 1 to 1,000,000, got 0"),
        ({"unconditional_every": 0}, [], "option 'unconditional_every': expected a number from 1 to 1,000,000, got 0"),
        (
            {"conditional": "second"},
            [Call((), {"hidden_states": torch.ones(2, 4, 8), "timestep": torch.zeros(2)})],
            r"denoises 3 dimensions \(2, 4, 8\), which have no height and width",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], given: list[Call], message: str) -> None:
    name = "wan" if given and len(given[0].kwargs["hidden_states"]) == 1 else "dit"
    with pytest.raises(AerogelError, match=message):
        Fastercache(**options).calibrate(opened(name), given)
