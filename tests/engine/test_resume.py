"""Killed at any point, a run resumes and ends with the same bits; a run made of something else is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.preflight import partial_of
from aerogel.engine.progress import Event
from aerogel.engine.result import Result
from aerogel.engine.resume import Progress
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.walk import blocks_of
from tests.crashing_runs import Doom, killed, options
from tests.folders import digests, model_folder, text_file
from tests.tiny import FAMILIES

BLOCKS = 4
RECIPE = {"name": "tested", "steps": [{"gptq": {"scheme": "W4A16_G32", "overrides": {"*.down_proj": "W3A16_G32_ASYM"}}}]}
LEARNED = {
    "name": "tested",
    "steps": [
        {"rtn": {"scheme": "W8A16_CHANNEL"}},
        {"attention_quant": {"bits": 3}},
        {"activation_ranges": {"steps": 4, "batch": 2, "rate": 0.05, "start": "minmax"}},
    ],
}
PRUNED = {"name": "tested", "steps": [{"erk": {"sparsity": 0.5}}, {"magnitude": {"sparsity": None}}, {"gptq": {"scheme": "W4A16_G32"}}]}
TWO_STAGES = {"name": "tested", "steps": [{"rotate": {}}, {"gptq": {"scheme": "W4A16_G32"}}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    text_file(folder / "text.txt")
    return model_folder(folder / "model", num_hidden_layers=BLOCKS)


def run(source: Path, output: Path, recipe: Any = RECIPE, **given: Any) -> Result:
    return compress(source, recipe, output=output, **{**options(source), **given})


def test_a_finished_block_is_known_to_be_pruned(source: Path, tmp_path: Path) -> None:
    """So that steps of a later stage keep its zeros."""
    for resumed in (False, True):
        network = open_model(source)
        assert network.checkpoint is not None
        stage = Progress.open(tmp_path / "out.partial", network, network.checkpoint, {}).stage(0)
        if resumed:
            stage.restore(["model.layers.1"])
        else:
            network.checkpoint.materialise(network.module)
            block = Block("model.layers.1", network.module.get_submodule("model.layers.1"), 1, BLOCKS, (), network)
            block.prune("mlp.up_proj", torch.zeros_like(block.module.get_submodule("mlp.up_proj").weight, dtype=torch.bool))
            stage.commit(block)
        assert network.pruned == {"model.layers.1.mlp.up_proj"}


@pytest.fixture(scope="module")
def unbroken(source: Path) -> Callable[[Any], dict[str, str]]:
    """What a run that nobody kills ends with."""

    @cache
    def ended(recipe: str) -> dict[str, str]:
        output = source.parent / f"unbroken-{hash(recipe)}"
        run(source, output, json.loads(recipe))
        return outcome(output)

    return lambda recipe: ended(json.dumps(recipe))


def outcome(output: Path) -> dict[str, str]:
    """Every file of the output by its content; of the record, what does not tell the time."""
    facts = json.loads((output / "aerogel.json").read_text())
    record = {key: facts[key] for key in ("recipe", "kept", "plan", "checksums")}
    journal = [{key: value for key, value in line.items() if key != "seconds"} for line in facts["journal"]]
    return {**digests(output), "aerogel.json": json.dumps([record, journal])}


@pytest.mark.parametrize("block", range(BLOCKS))
def test_killed_at_a_block(source: Path, tmp_path: Path, block: int, unbroken: Callable[[Any], dict[str, str]]) -> None:
    output = tmp_path / "out"
    killed(source, output, RECIPE, Doom("block", block))
    assert not output.exists()
    seen: list[Event] = []
    run(source, output, resume=True, tell=seen.append)
    first = next(event for event in seen if event.stage == "compress" and event.what)
    assert first.done == block, "finished blocks are not done again"
    assert outcome(output) == unbroken(RECIPE)
    assert not partial_of(output).exists()


def _rarely(doom: Doom) -> Any:
    return pytest.param(doom, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "doom",
    [
        *(Doom("save"), Doom("shard", 1)),
        *(Doom("file", count) for count in (1, 2, 3, 6)),
        *(Doom("activation", count) for count in (1, 2, 5)),
        *(_rarely(Doom("file", count)) for count in (4, 5, 7, 8, 9)),
        *(_rarely(Doom("activation", count)) for count in (3, 4, 6, 7)),
    ],
    ids=lambda doom: f"{doom.at}-{doom.count}",
)
def test_killed_between_writes(source: Path, tmp_path: Path, doom: Doom, unbroken: Callable[[Any], dict[str, str]]) -> None:
    output = tmp_path / "out"
    killed(source, output, RECIPE, doom)
    run(source, output, resume=True)
    assert outcome(output) == unbroken(RECIPE)


def test_killed_once_it_has_its_name(source: Path, tmp_path: Path, unbroken: Callable[[Any], dict[str, str]]) -> None:
    output = tmp_path / "out"
    killed(source, output, RECIPE, Doom("name"))
    assert outcome(output) == unbroken(RECIPE)
    for resume in (False, True):
        with pytest.raises(AerogelError, match=r"out is finished, and .*out.partial is left over from its run; remove out.partial, or"):
            run(source, output, resume=resume)
    assert outcome(output) == unbroken(RECIPE)


def test_killed_while_it_saves_leaves_nothing_for_good(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed(source, output, RECIPE, Doom("shard", 1))
    assert len(list(tmp_path.glob(".out.*.saving"))) == 1
    run(source, output, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_again_and_again(source: Path, tmp_path: Path, unbroken: Callable[[Any], dict[str, str]]) -> None:
    output = tmp_path / "out"
    for block in range(1, BLOCKS):
        killed(source, output, RECIPE, Doom("block", block))
    run(source, output, resume=True)
    assert outcome(output) == unbroken(RECIPE)


@pytest.mark.parametrize("recipe", [TWO_STAGES, PRUNED], ids=["rotated", "pruned"])
@pytest.mark.parametrize("done", [BLOCKS, 2 * BLOCKS - 1])
def test_steps_on_the_whole_network_are_done_again(
    source: Path, tmp_path: Path, done: int, recipe: dict[str, Any], unbroken: Callable[[Any], dict[str, str]]
) -> None:
    output = tmp_path / "out"
    killed(source, output, recipe, Doom("block", done))
    run(source, output, recipe, resume=True)
    assert outcome(output) == unbroken(recipe)


def test_step_sizes_that_were_learned_are_not_lost(source: Path, tmp_path: Path, unbroken: Callable[[Any], dict[str, str]]) -> None:
    output = tmp_path / "out"
    killed(source, output, LEARNED, Doom("block", 2 * BLOCKS + 2))
    run(source, output, LEARNED, resume=True)
    assert outcome(output) == unbroken(LEARNED)
    journal = json.loads((output / "aerogel.json").read_text())["journal"]
    assert len([line for line in journal if "step_size" in line]) == 4 * BLOCKS


@pytest.fixture(scope="module")
def unfinished(source: Path) -> Path:
    """The output of a run that was killed."""
    output = source.parent / "unfinished"
    killed(source, output, RECIPE, Doom("block", 2))
    return output


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("recipe", {"recipe": {"name": "tested", "steps": [{"gptq": {"scheme": "W8A16_G32"}}]}}),
        ("seed", {"seed": 1}),
        ("data", {}),
        ("model", {}),
        ("versions", {}),
        ("threads", {}),
    ],
)
def test_a_run_made_of_something_else_is_refused(
    source: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, given: dict[str, Any]
) -> None:
    before = digests(partial_of(unfinished))
    if part == "versions":
        monkeypatch.setattr("aerogel.engine.provenance.versions", lambda: {"aerogel": "0.0.1"})
    if part == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    if part == "data":
        given = {"samples": Samples(source.parent / "text.txt", count=5, length=24)}
    if part == "model":
        shutil.copy(source.parent / "text.txt", tmp_path)
        source = model_folder(tmp_path / "model", num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(AerogelError, match=f"was started with another {part} .*to resume, or remove the folder"):
        run(source, unfinished, resume=True, **given)
    assert digests(partial_of(unfinished)) == before


def test_an_unfinished_run_is_not_overwritten(source: Path, unfinished: Path) -> None:
    before = digests(partial_of(unfinished))
    with pytest.raises(AerogelError, match=r"unfinished\.partial holds an unfinished run; add --resume .* or remove the folder"):
        run(source, unfinished)
    assert digests(partial_of(unfinished)) == before


def test_a_folder_that_is_no_run_is_not_touched(source: Path, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    for resumed in (False, True):
        with pytest.raises(AerogelError, match="is in the way"):
            run(source, tmp_path / "out", resume=resumed)
    assert digests(partial).keys() == {"mine.txt"}


def test_files_of_a_progress_folder_that_would_be_waited_for_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    (folder / "stage-0").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    network, walk = open_model(model_folder(tmp_path / "model", num_hidden_layers=1)), folder / "stage-0" / "walk.json"
    walk.write_text("[" * 100_000)
    with pytest.raises(AerogelError, match=r"walk\.json is nested too deeply to be read; remove the progress folder"):
        Progress.open(folder, network, network.checkpoint, {})
    walk.unlink()
    os.mkfifo(walk)
    with pytest.raises(AerogelError, match=r"walk\.json is no regular file; remove the progress folder to start again"):
        Progress.open(folder, network, network.checkpoint, {})


@pytest.mark.parametrize(
    ("key", "value"), [("notes", [{"name": "x", "method": 1e308}]), ("pruned", 3), ("structure", {"config_groups": 1})]
)
def test_a_finished_block_that_was_changed_is_named(key: str, value: Any, tmp_path: Path) -> None:
    network = open_model(model_folder(tmp_path / "model", num_hidden_layers=1))
    assert network.checkpoint is not None
    stage = Progress.open(tmp_path / "out.partial", network, network.checkpoint, {}).stage(0)
    network.checkpoint.materialise(network.module)
    block = next(iter(blocks_of(network)))
    stage.commit(block)
    name = block.name
    assert [finished.block for finished in stage.restore([name])] == [name]
    path = tmp_path / "out.partial" / "stage-0" / "blocks" / name / "block.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(AerogelError, match=r"block\.json is damaged; remove the progress folder to start again"):
        stage.restore([name])


def test_what_is_held_in_memory_whole_is_not_resumed(tmp_path: Path) -> None:
    """A denoiser, also from a folder, and a live module: nothing is kept that a run could go on from."""
    unet = FAMILIES["unet"]
    unet.build().save_pretrained(tmp_path / "in")  # type: ignore[operator]
    given: dict[str, Any] = {"samples": unet.calls(1), "measures": (), "output": tmp_path / "out", "resume": True}
    recipe = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}]}
    with pytest.raises(AerogelError, match=r"in is held in memory whole .*, so nothing of an unfinished run is kept; leave resume out"):
        compress(tmp_path / "in", recipe, **given)
    with pytest.raises(AerogelError, match="only a model opened from a folder and saved to an output can be resumed"):
        compress(unet.build(), recipe, **given)
