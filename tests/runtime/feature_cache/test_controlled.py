"""Decisions from outside: the same answers as a table gives, mixtures by the formula, gradients for the scores at hand alone."""

from __future__ import annotations

import pytest
import torch

from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.controlled import controlled
from aerogel.runtime.feature_cache.schedule import caching
from tests.runtime.feature_cache.test_schedule import NAMES, calls, everything, scattered, table
from tests.tiny import opened, output


@pytest.mark.parametrize("name", NAMES)
def test_rows_answer_like_a_table(name: str) -> None:
    network = opened(name)
    computed_TN = scattered(network)
    with caching(network, table(network, computed_TN)):
        wanted = [output(network.module, call) for call in calls(name)]
    with controlled(network) as denoiser, torch.no_grad():
        held = denoiser.empty
        for row, call in enumerate(calls(name)):
            made, held = denoiser.step(call, computed_TN[row].tolist(), held)
            assert torch.equal(made.sample, wanted[row])


@pytest.mark.parametrize("name", NAMES)
def test_full_scores_compute_all_and_leave_the_plain_forward_alone(name: str) -> None:
    network = opened(name)
    wanted = [output(network.module, call) for call in calls(name)]
    with controlled(network) as denoiser, torch.no_grad():
        held = denoiser.empty
        for row, call in enumerate(calls(name)):
            before = held
            made, held = denoiser.step(call, torch.ones(len(cached_modules_of(network))), held, 0.1)
            torch.testing.assert_close(made.sample, wanted[row], rtol=1e-5, atol=1e-6)
            assert torch.equal(denoiser.plain(call).sample, wanted[row])
            assert all(kept is not None for kept in held)
            assert before is not held
        for row in (False, True):
            assert torch.equal(denoiser.step(calls(name)[0], everything(network)[0].tolist(), held)[0].sample, wanted[0]), row


def test_a_score_mixes_new_and_kept() -> None:
    """One module with score s gives s x new + (1 - s) x kept; it is refreshed with the mixture above the threshold only."""
    network = opened("dit")
    first, second = calls("dit")[:2]
    name = next(iter(cached_modules_of(network)))
    module = network.module.get_submodule(name)
    with controlled(network) as denoiser, torch.no_grad():
        _, held = denoiser.step(first, [True] * 4, denoiser.empty)
        own = module.forward
        given: dict[str, torch.Tensor] = {}

        def watch(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            given["new"] = own.answer.__self__.own(*args, **kwargs)
            given["mixed"] = own(*args, **kwargs)
            return given["mixed"]

        module.__dict__["forward"] = watch
        scores = torch.tensor([0.25, 1.0, 1.0, 1.0])
        for threshold, refreshed in ((0.1, True), (0.3, False)):
            _, after = denoiser.step(second, scores, held, threshold)
            torch.testing.assert_close(given["mixed"], 0.25 * given["new"] + 0.75 * held[0])
            assert torch.equal(after[0], given["mixed"] if refreshed else held[0])
        module.__dict__["forward"] = own


def test_gradients_reach_the_scores_and_nothing_else() -> None:
    network = opened("dit")
    network.module.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in network.module.parameters()]
    first, second = calls("dit")[:2]
    scores = torch.full((4,), 0.5, requires_grad=True)
    with controlled(network) as denoiser:
        _, held = denoiser.step(first, scores, denoiser.empty, 0.1)
        made, after = denoiser.step(second, scores, held, 0.1)
        assert not any(kept.requires_grad for kept in (*held, *after))
        made.sample.square().sum().backward()
    assert scores.grad is not None
    assert (scores.grad != 0).all()
    assert all(parameter.grad is None for parameter in network.module.parameters())
    assert [parameter.requires_grad for parameter in network.module.parameters()] == flags
