"""Every architecture of transformers' auto mappings and of diffusers is built tiny and runs."""

from __future__ import annotations

import pytest
import torch

from aerogel.model.calls import tensors_in
from tests.architectures.cases import NOT_BUILT, SAMPLE, Case, cases, outcomes, output

CASES = {str(case): case for case in cases()}
TARGETS = {"causal": 175, "seq2seq": 25, "image-text": 75, "audio-text": 9, "denoiser": 32}


def every(names: set[str]) -> list[object]:
    return [pytest.param(CASES[name], id=name, marks=() if name in SAMPLE else pytest.mark.slow) for name in sorted(names)]


@pytest.mark.filterwarnings("ignore")  # the libraries' own warnings about small configurations
@pytest.mark.parametrize("case", every(CASES.keys() - NOT_BUILT.keys()))
def test_runs_the_same_for_the_same_seed(case: Case) -> None:
    first, second = case.make(), case.make()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    calls = case.calls(first)
    assert len({tuple(tensor.shape for tensor in tensors_in((call.args, call.kwargs))) for call in calls}) == 2
    for call in calls:
        answer = output(first, call)
        assert answer.isfinite().all()
        assert answer.unique().numel() >= 32
        assert torch.equal(output(second, call), answer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", every(CASES.keys() - NOT_BUILT.keys()))
def test_every_parameter_is_random_float32_and_without_gradient(case: Case) -> None:
    module = case.make()
    assert not module.training
    assert sum(parameter.numel() for parameter in module.parameters()) < 60e6
    for key, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32, key
        assert not parameter.requires_grad, key
        assert parameter.numel() == 1 or parameter.std() > 0, key


def test_the_sample_is_of_24_cases() -> None:
    assert len(SAMPLE) == 24
    assert SAMPLE.keys() <= CASES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_as_many_types_run_as_are_promised() -> None:
    found = outcomes(CASES.values())
    ran = [outcome for outcome in found if not outcome.reason]
    for kind, target in TARGETS.items():
        assert sum(outcome.kind == kind for outcome in ran) >= target
    failed = {f"{outcome.kind}-{outcome.name}": outcome.reason for outcome in found if outcome.reason}
    assert failed.keys() == NOT_BUILT.keys()
    assert all(words in failed[name] for name, words in NOT_BUILT.items())
