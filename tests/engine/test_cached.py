"""A policy for a while: inside the pipeline paints by it, outside it is what it was to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.runtime.feature_cache.cached_modules import costs_of
from tests.runtime.feature_cache.test_replay import dit_pipeline
from tests.tiny import opened

WANTED = Denoising(count=2, steps=4, batch=2)
FORA = {"steps": [{"fora": {}}]}


def paint(pipeline: Any, **options: Any) -> Tensor:
    made = pipeline(class_labels=[0, 7], num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="pt", **options)
    return torch.as_tensor(made.images)


def test_it_is_on_inside_and_off_outside() -> None:
    pipeline = dit_pipeline().processor
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    before = paint(pipeline)
    with aerogel.cached(pipeline, FORA, samples=WANTED) as found:
        inside = paint(pipeline)
        assert torch.equal(paint(pipeline), inside)
    assert found[0].state.computed == ("11", "00", "11", "00")
    assert not torch.equal(inside, before)
    assert torch.equal(paint(pipeline), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize("given_up_after", [1, 2, 3])
def test_a_run_that_was_given_up_leaves_nothing_to_the_next(given_up_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the denoiser, where only the sampler can tell that a new run begins."""
    pipeline = dit_pipeline().processor
    with aerogel.cached(pipeline, FORA, samples=WANTED):
        wanted = paint(pipeline)
        own, done = pipeline.scheduler.step, []

        def step(*args: Any, **kwargs: Any) -> Any:
            done.append(args)
            if len(done) == given_up_after:
                raise KeyboardInterrupt
            return own(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(pipeline.scheduler, "step", step)
            with pytest.raises(KeyboardInterrupt):
                pipeline(class_labels=[7, 7], num_inference_steps=4, generator=torch.Generator().manual_seed(5))
        assert torch.equal(paint(pipeline), wanted)


def test_a_saved_folder_and_a_result_are_policies(tmp_path: Path) -> None:
    pipeline = dit_pipeline().processor
    with aerogel.cached(pipeline, FORA, samples=WANTED):
        wanted = paint(pipeline)
    result = aerogel.compress(pipeline, FORA, samples=WANTED, output=tmp_path / "out", measures=())
    for policy in (result, tmp_path / "out", str(tmp_path / "out")):
        with aerogel.cached(pipeline, policy):
            assert torch.equal(paint(pipeline), wanted)


def test_a_schedule_says_what_it_saves() -> None:
    """Half of the steps reuse all cached modules, which are most of the network, but not the embedders."""
    network = dit_pipeline()
    with aerogel.cached(network, FORA, samples=WANTED) as found:
        paint(network.processor)
    state = found[0].state
    one = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([0]), "class_labels": torch.tensor([0])}
    costs = costs_of(network, Call((), one))
    assert state.macs == costs.macs
    assert state.macs_saved == pytest.approx(sum(costs.module_macs) / costs.macs / 2)
    assert 0 < state.macs_saved < 0.5
    assert state.cache_bytes == sum(costs.module_bytes)
    assert json.loads(json.dumps(state.as_dict())) == state.as_dict()


def test_a_result_of_another_family_is_refused() -> None:
    result = aerogel.compress(dit_pipeline().processor, FORA, samples=WANTED, measures=())
    with (
        pytest.raises(AerogelError, match="of the dit family, and this model is of the wan family"),
        aerogel.cached(opened("wan"), result),
    ):
        pass


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"fora": {}}, {"rtn": {"scheme": "W8A16_CHANNEL"}}],
            "rtn comes after fora, but needs a model of which every module runs; put fora last",
        ),
        ([{"fora": {}}, {"fsc": {}}], "fsc comes after fora"),
        ([{"uniform_cache": {}}, {"fora": {}}], "fora comes after uniform_cache, and a model has one feature cache"),
    ],
)
def test_what_cannot_come_after_reuse_is_refused(steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        aerogel.compress(dit_pipeline().processor, {"steps": steps}, samples=WANTED, measures=())


def test_quantization_comes_before(tmp_path: Path) -> None:
    """The schedule is made for the quantized network, and the folder has both."""
    steps = [{"rtn": {"scheme": "W8A8"}}, {"harmonica": {"ratio": 0.3, "trajectories": 2}}]
    result = aerogel.compress(dit_pipeline().processor, {"steps": steps}, samples=WANTED, output=tmp_path / "out", measures=())
    opened = aerogel.load(tmp_path / "out", lazy=False)
    with aerogel.cached(result.network, result):
        wanted = paint(result.network.processor)
    assert torch.equal(paint(opened.processor), wanted)
    assert not torch.equal(paint(result.network.processor), wanted)


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    pipeline = dit_pipeline().processor
    with pytest.raises(AerogelError, match="rtn changes the weights permanently"), aerogel.cached(pipeline, "rtn-w8a8", samples=WANTED):
        pass
    aerogel.compress(dit_pipeline().processor, "rtn-w8a8", samples=WANTED, output=tmp_path / "out", measures=())
    with pytest.raises(AerogelError, match="has no runtime policies"), aerogel.cached(pipeline, tmp_path / "out"):
        pass
