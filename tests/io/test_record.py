"""aerogel.json: what is written is read back, what is wrong is named, and folders of earlier releases are read under today's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel.errors import AerogelError
from aerogel.io import older
from aerogel.io.record import files
from aerogel.io.record.schema import Record
from aerogel.report import search
from tests.folders import digests
from tests.report.runs import answers, coverage, full, images, schedule
from tests.tiny import FAMILIES

OLDER = Path(__file__).parent.parent / "fixtures/before_layers"
EVERYTHING: dict[str, Any] = full() | {"coverage": coverage(), "policies": [schedule()], "checksums": {"model.safetensors": "sha256:00"}}


def written(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / files.FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("content", [EVERYTHING, images()], ids=["text", "images"])
def test_what_is_written_is_what_was_read(tmp_path: Path, content: dict[str, Any]) -> None:
    read = files.read(written(tmp_path / "a", content))
    (tmp_path / "b").mkdir()
    files.write(tmp_path / "b", read)
    assert json.loads((tmp_path / "b" / files.FILE).read_text()) == content
    assert [path.name for path in (tmp_path / "b").iterdir()] == [files.FILE]
    assert read.folder == "a"
    assert files.read(tmp_path / "b").replaced(folder="a") == read


def test_what_was_never_measured_is_absent() -> None:
    record = files.parse({"model": {"name": "m"}})
    assert record.as_dict() == {"schema": older.SCHEMA, "model": {"name": "m"}}
    assert record.replaced(timings={"load": 1}).as_dict()["timings"] == {"load": 1.0}


def test_measures_are_added_to_those_that_are_there() -> None:
    record = files.parse(full()).with_metrics({"compressed": {"size": {"disk_bytes": 3}, "of_a_plugin": {"score": 1}}, "original": {}})
    assert record.metrics.compressed.size is not None
    assert record.metrics.compressed.size.bytes == 3
    assert record.metrics.as_dict()["compressed"]["of_a_plugin"] == {"score": 1}
    for side in ("original", "compressed"):
        kept = {name: figures for name, figures in full()["metrics"][side].items() if (side, name) != ("compressed", "size")}
        assert {name: record.metrics.as_dict()[side][name] for name in kept} == kept


def test_methods_may_note_more_than_the_schema_declares() -> None:
    (line,) = files.parse({"model": {"name": "m"}, "journal": [{"name": "fc", "damping": 0.01}]}).journal
    assert line.as_dict() == {"name": "fc", "damping": 0.01}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {}}, r"aerogel\.json: model\.name: field required; it was changed after `aerogel compress` wrote it"),
        ({"model": {"name": "m", "familly": "llama"}}, r"model\.familly: extra inputs are not permitted"),
        ({"plans": {}}, r"plans: extra inputs are not permitted"),
        ({"plan": {"share_reached": "all"}}, r"plan\.share_reached: input should be a valid number"),
        ({"journal": [{"name": "a"}, {"error": 0.1}]}, r"journal\.1\.name: field required"),
        ({"metrics": {"compressed": {"of_a_plugin": 3}}}, r"metrics\.compressed\.of_a_plugin: input should be a valid dictionary"),
        ({"provenance": {"calibration": {"width": [1, 2]}}}, r"provenance\.calibration: value error, width is \[1, 2\]"),
        ({"recipe": {"steps": "gptq"}}, r"recipe\.steps: input should be a valid list"),
        ({"schema": older.SCHEMA + 1}, rf"has schema {older.SCHEMA + 1} and this release reads up to {older.SCHEMA}; upgrade aerogel"),
        ({"schema": "two"}, "schema: 'two' is not a schema number"),
    ],
)
@pytest.mark.parametrize("schema", [1, older.SCHEMA])
def test_what_is_wrong_is_named(tmp_path: Path, schema: int, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        files.read(written(tmp_path, {"schema": schema, "model": {"name": "m"}} | changed))


@pytest.mark.parametrize(
    "content", [[], 3, {"recipe": 3}, {"policies": 3, "coverage": 3}, {"recipe": {"steps": [3]}}, {"policies": [{}, 3]}]
)
def test_malformed_older_records_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(AerogelError, match=r"aerogel\.json(: | holds a JSON (array|number), expected an object)"):
        files.read(written(tmp_path, content))


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(("then", "now"), older.METHODS.items())
def test_older_names_of_methods(schema: int, then: str, now: str) -> None:
    step, renamed = {then: {"ratio": 0.5}}, {now: {"ratio": 0.5}}
    facts = {
        "schema": schema,
        "model": {"name": "m"},
        "recipe": {"steps": [step, {"rtn": None}]},
        "policies": [{"step": step, "state": {}}],
    }
    record = files.parse(facts)
    assert record.recipe.steps == [renamed, {"rtn": {}}]
    assert record.policies[0].step == renamed
    found = older.upgraded_search({"schema": schema, "rows": [{"policy": then, "step": step}], "left_out": [{"policy": then}]})
    assert found == {"schema": older.SCHEMA, "rows": [{"policy": now, "step": renamed}], "left_out": [{"policy": now}]}


@pytest.mark.parametrize(("then", "now"), older.OPTIONS.items())
def test_older_names_of_options(then: str, now: str) -> None:
    assert files.parse({"model": {"name": "m"}, "recipe": {"steps": [{"awq": {then: 1}}]}}).recipe.steps == [{"awq": {now: 1}}]


@pytest.mark.parametrize(("then", "now"), older.MEASURES.items())
def test_older_names_of_measures(then: str, now: str) -> None:
    figures = {"kl": 0.1, "top1": 0.9, "right": 0.8, "count": 3}
    metrics = files.parse({"model": {"name": "m"}, "metrics": {"original": {then: figures}}}).metrics
    assert metrics.as_dict() == {"original": {now: figures}}


@pytest.mark.parametrize(("then", "now"), older.FIGURES.items())
def test_older_names_of_figures(then: str, now: str) -> None:
    metrics = files.parse({"model": {"name": "m"}, "metrics": {"compressed": {"sampling": {then: 2.0}}}}).metrics
    assert metrics.as_dict() == {"compressed": {"sampling": {now: 2.0}}}


@pytest.mark.parametrize(("then", "now"), older.PARTS.items())
def test_older_names_of_parts_of_the_size(then: str, now: str) -> None:
    metrics = files.parse({"model": {"name": "m"}, "metrics": {"compressed": {"size": {"parts": {then: 3}}}}}).metrics
    assert metrics.as_dict() == {"compressed": {"size": {"parts": {now: 3}}}}


@pytest.mark.parametrize(("then", "now"), older.COVERAGE.items())
def test_older_names_of_the_coverage(then: str, now: str) -> None:
    found = files.parse({"model": {"name": "m"}, "coverage": {"layers": 1, then: ["fc"]}}).coverage
    assert found is not None
    assert found.as_dict() == {"layers": 1, now: ["fc"]}


def test_older_names_of_figures_of_skipped_experts() -> None:
    names = {now: then for then, now in older.SKIPPED.items()}
    then = answers() | {"skipped": {names.get(key, key): value for key, value in answers()["skipped"].items()}}
    assert then != answers()
    found = files.parse({"model": {"name": "m"}, "metrics": {"compressed": {"exact_match": then}}}).metrics.compressed.exact_match
    assert (
        found == files.parse({"model": {"name": "m"}, "metrics": {"compressed": {"exact_match": answers()}}}).metrics.compressed.exact_match
    )
    assert older.upgraded_search({"rows": [then]})["rows"] == [answers()]


def test_a_search_of_a_newer_release_is_refused() -> None:
    with pytest.raises(AerogelError, match=r"search\.json has schema 99 and this release reads up to"):
        search.page({"schema": 99, "task": "cache"})


def test_an_older_record_is_written_under_todays_names(tmp_path: Path) -> None:
    files.write(tmp_path, files.read(OLDER / "experts"))
    content = json.loads((tmp_path / files.FILE).read_text())
    assert content["schema"] == older.SCHEMA
    assert content["journal"] == json.loads((OLDER / "experts" / files.FILE).read_text())["journal"]
    assert next(iter(content["policies"][0]["step"])) == "reduced_topk"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with quantized layers and a policy whose state has tensors."""
    recipe = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"temporal_cache": {}}]}
    result = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=FAMILIES["unet"].calls(2), measures=())
    return result.save(tmp_path_factory.mktemp("saved") / "out")


def test_a_result_gives_plain_data(saved: Path) -> None:
    record = files.read(saved)
    assert isinstance(record, Record)
    assert set(record.checksums) == {path.name for path in saved.glob("*.safetensors")} | {
        str(path.relative_to(saved)) for path in saved.glob("*/*.safetensors")
    }
    assert record.checksums == {file: f"sha256:{digest}" for file, digest in digests(saved).items() if file in record.checksums}


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_altered_weights_are_named_when_the_folder_is_opened(saved: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    aerogel.load(folder)
    for file in files.read(saved).checksums:
        kept = (folder / file).read_bytes()
        if damage == "changed":
            (folder / file).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            with pytest.raises(AerogelError, match=rf"{file} is not what aerogel\.json has the checksum of: expected sha256:\w+, found"):
                aerogel.load(folder)
        else:
            (folder / file).unlink()
            with pytest.raises(AerogelError):
                files.verify(folder)
        (folder / file).write_bytes(kept)
    assert torch.is_tensor(next(aerogel.load(folder).module.parameters()))
