"""ToCa and DuCa where users meet them: whole runs of pipelines, several streams, and models that they refuse."""

from __future__ import annotations

from functools import partial
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
from aerogel.numerics.attention import attention
from aerogel.runtime.attention import attending
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.partial_token_cache import grid_of
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from tests.methods.feature_cache.test_toca import MANY, NINE, run
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded
from tests.runtime.feature_cache.test_schedule import calls
from tests.tiny import opened, output


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
    network = dit_pipeline()
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
        ({"interval": 1}, "option 'interval': expected a number from 2 to 1,000,000, got 1"),
        ({"cell": 0}, "option 'cell': expected a number from 1 to 1,000,000, got 0"),
        ({"pace": 1.0}, "option 'pace': expected a number from 0 to below 1, got 1.0"),
        ({"dense": (0.4, 0.2)}, r"option 'dense': expected two shares in order, got \[0.4, 0.2\]"),
        ({"ratio": -0.1}, "option 'ratio': expected a number of at least 0, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
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
