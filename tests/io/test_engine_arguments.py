"""Arguments of vLLM beside the weights: written where vLLM has the rule of the policy, and for models whose videos it prunes only."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import aerogel
from aerogel.engine.exporting import export, source_of
from aerogel.engine.opening import open_model
from aerogel.engine.planning import Plan, plan
from aerogel.io import engine_arguments
from aerogel.io.engines import ENGINES, PRUNES_VIDEOS
from aerogel.methods.video_tokens.evs import Evs
from tests.methods.video_tokens.clip_calls import clip_call
from tests.tiny import FAMILIES

ROUNDED = {"rtn": {"scheme": "W4A16_G16", "targets": ["*.language_model.*.q_proj"]}}
EVS = {"evs": {"pruning_rate": 0.6}}
VLLM = [engine.label for name, engine in ENGINES.items() if name.startswith("vllm")]


def compressed(folder: Path, output: Path, *steps: dict[str, Any]) -> Path:
    aerogel.compress(folder, {"name": "clips", "steps": list(steps)}, output=output, samples=[clip_call()], measures=())
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and what compressing makes of it with the policy."""
    made = tmp_path_factory.mktemp("arguments")
    FAMILIES["qwen2_5_vl"].build(0).save_pretrained(made / "model")
    compressed(made / "model", made / "out", ROUNDED, EVS)
    return made


def test_a_folder_tells_vllm_to_prune_as_the_policy_does(folders: Path) -> None:
    text = (folders / "out/vllm.yaml").read_text("utf-8")
    assert yaml.safe_load(text) == {"video-pruning-rate": 0.6}
    assert "vllm serve FOLDER --config FOLDER/vllm.yaml" in text
    assert not (folders / "model/vllm.yaml").exists()
    (policy,) = source_of(folders / "out").policies
    assert policy.method.pruning_rate == 0.6


@pytest.mark.parametrize("step", [{"dycoke": {}}, {"evs": {"frames": 2}}])
def test_other_policies_leave_no_arguments_not_even_those_of_the_model(folders: Path, tmp_path: Path, step: dict[str, Any]) -> None:
    assert (folders / "out/vllm.yaml").is_file()
    assert not (compressed(folders / "out", tmp_path / "again", step) / "vllm.yaml").exists()


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl_moe", "qwen2_vl", "llava", None])
def test_models_whose_videos_vllm_leaves_whole_get_none(tmp_path: Path, model_type: str | None) -> None:
    """An older file goes, whoever wrote it."""
    (tmp_path / "vllm.yaml").write_text("tensor-parallel-size: 2\n")
    arguments = Evs().engine_arguments
    engine_arguments.write(tmp_path, arguments, SimpleNamespace(model_type=model_type))
    assert (tmp_path / "vllm.yaml").exists() == (model_type in PRUNES_VIDEOS)
    assert engine_arguments.are_in(tmp_path, arguments) == (model_type in PRUNES_VIDEOS)
    assert not engine_arguments.are_in(tmp_path, Evs(pruning_rate=0.25).engine_arguments)
    assert not engine_arguments.are_in(tmp_path, {})


def test_exported_folders_keep_the_arguments(folders: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(folders / "out", "compressed_tensors", tmp_path / "out")
    assert (tmp_path / "out/vllm.yaml").read_bytes() == (folders / "out/vllm.yaml").read_bytes()
    (folders / "out/vllm.yaml").rename(tmp_path / "vllm.yaml")
    with pytest.warns(UserWarning, match="runs without evs, which compressed_tensors has no place for"):
        export(folders / "out", "compressed_tensors", tmp_path / "other")
    (tmp_path / "vllm.yaml").rename(folders / "out/vllm.yaml")


def planned(folder: Path, *steps: dict[str, Any]) -> Plan:
    recipe = {"name": "clips", "steps": list(steps)}
    return plan(open_model(folder), recipe, samples=[clip_call()], flops_a_second=lambda: 1e9)  # type: ignore[arg-type]


def test_a_plan_says_that_vllm_does_the_same(folders: Path) -> None:
    lost = "{} acts in aerogel only; the weights open without it"
    for label, reasons in planned(folders / "model", EVS).engines.items():
        assert (lost.format("evs") in reasons) == (label not in VLLM)
    assert all(lost.format("dycoke") in reasons for reasons in planned(folders / "model", {"dycoke": {}}).engines.values())
    assert all(lost.format("evs") in reasons for reasons in planned(folders / "model", {"evs": {"frames": 2}}).engines.values())


@pytest.mark.parametrize("text", ["- 1", "a: [", "", "video-pruning-rate: 0.5", "[" * 2000])
def test_a_file_that_says_something_else_has_no_arguments(tmp_path: Path, text: str) -> None:
    (tmp_path / "vllm.yaml").write_text(text)
    assert not engine_arguments.are_in(tmp_path, {"video-pruning-rate": 0.6})
    (tmp_path / "vllm.yaml").write_text("video-pruning-rate: 0.6\ntensor-parallel-size: 2\n")
    assert engine_arguments.are_in(tmp_path, {"video-pruning-rate": 0.6})
