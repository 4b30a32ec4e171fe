"""Two processes on one output: one makes it, the other is told so in one line or does the same; nothing is lost or left half-written."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import aerogel
from aerogel.engine import exporting
from aerogel.engine.result import add_metrics
from aerogel.engine.search.searching import search
from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.report import page
from tests.crashing_runs import CONTEXT, Doom, killed, options
from tests.folders import digests, model_folder, text_file

RECIPE = {"name": "tested", "steps": [{"gptq": {"scheme": "W4A16_G32"}}]}
TIMED = ("aerogel.json", "report.html", "search.json")
"""Files that tell the time."""


class Place(NamedTuple):
    """The folders of a race."""

    source: Path
    done: Path
    """The source compressed."""
    output: Path


def _compress(at: Place, resume: bool = False) -> None:
    aerogel.compress(at.source, RECIPE, output=at.output, resume=resume, **options(at.source))


def _resume(at: Place) -> None:
    _compress(at, resume=True)


def _export(at: Place) -> None:
    exporting.export(at.done, "gptq", at.output)


def _search(at: Place) -> None:
    search(at.source.parent / "experts", "skip", 0.4, only=("modes",), samples=options(at.source)["samples"], output=at.output, rounds=1)


def _report(at: Place) -> None:
    for _ in range(20):
        page.write(at.output)


def _add_first(at: Place) -> None:
    add_metrics(at.output, {"compressed": {"perplexity": {"perplexity": 9.0}}})


def _add_second(at: Place) -> None:
    add_metrics(at.output, {"compressed": {"size": {"disk_bytes": 7}}})


JOBS: Mapping[str, Callable[[Place], None]] = {
    "compress": _compress,
    "resume": _resume,
    "export": _export,
    "search": _search,
    "report": _report,
    "add first": _add_first,
    "add second": _add_second,
}


class Ended(NamedTuple):
    """How a process ended: nothing, one line, or a traceback."""

    line: str = ""
    crash: str = ""


def raced(at: Place, first: str, second: str, head_start: float) -> list[Ended]:
    """Start two jobs, the second so many seconds after the first; returns how they ended."""
    told = CONTEXT.SimpleQueue()
    barrier = CONTEXT.Barrier(2)
    for number, (job, wait) in enumerate(((first, 0.0), (second, head_start))):
        CONTEXT.Process(target=_run, args=(number, job, at, wait, barrier, told), daemon=True).start()
    ended = dict(told.get() for _ in range(2))
    return [ended[0], ended[1]]


def _run(number: int, job: str, at: Place, wait: float, barrier: Any, told: Any) -> None:
    barrier.wait(60)
    time.sleep(wait)
    try:
        JOBS[job](at)
        told.put((number, Ended()))
    except AerogelError as error:
        told.put((number, Ended(line=str(error))))
    except BaseException:  # noqa: BLE001 - the test shows it
        told.put((number, Ended(crash=traceback.format_exc())))


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name not in TIMED}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and in `ended` what each job makes of it when nobody disturbs."""
    folder = tmp_path_factory.mktemp("races")
    text_file(folder / "text.txt")
    model_folder(folder / "model", num_hidden_layers=2)
    (folder / "ended").mkdir()
    aerogel.compress(folder / "model", RECIPE, output=folder / "ended" / "compress", **options(folder / "model"))
    exporting.export(folder / "ended" / "compress", "gptq", folder / "ended" / "export")
    return folder


def place(folders: Path, tmp_path: Path) -> Place:
    return Place(folders / "model", folders / "ended" / "compress", tmp_path / "out")


def rarely(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("first", "second", "head_start"),
    [
        ("compress", "export", 0.0),
        rarely("compress", "compress", 0.0),
        *(rarely("compress", "compress", wait) for wait in (0.02, 0.1, 0.3, 1.0)),
        *(rarely("compress", "resume", wait) for wait in (0.0, 0.1, 0.5)),
        *(rarely("export", "compress", wait) for wait in (0.0, 0.02)),
        *(rarely("export", "export", wait) for wait in (0.0, 0.01, 0.05)),
    ],
)
def test_one_makes_the_output(first: str, second: str, head_start: float, folders: Path, tmp_path: Path) -> None:
    at = place(folders, tmp_path)
    ended = raced(at, first, second, head_start)
    assert not any(one.crash for one in ended), ended
    lost = [one.line for one in ended if one.line]
    assert len(lost) == 1
    assert "another run" in lost[0] or "not empty" in lost[0] or "is finished" in lost[0], lost
    assert "\n" not in lost[0]
    won = (first, second)[[one.line for one in ended].index("")].replace("resume", "compress")
    assert content(at.output) == content(folders / "ended" / won)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("head_start", [0.0, rarely(0.05), rarely(0.5)])
def test_two_resume_one_run(head_start: float, folders: Path, tmp_path: Path) -> None:
    at = place(folders, tmp_path)
    killed(at.source, at.output, RECIPE, Doom("block", 1))
    ended = raced(at, "resume", "resume", head_start)
    assert not any(one.crash for one in ended), ended
    assert len([one for one in ended if one.line]) == 1
    assert content(at.output) == content(at.done)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("head_start", [0.0, 0.3])
def test_a_search_and_a_run(head_start: float, folders: Path, tmp_path: Path) -> None:
    if not (folders / "experts").exists():
        model_folder(folders / "experts", "mixtral", num_hidden_layers=2)
    at = place(folders, tmp_path)
    ended = raced(at, "search", "compress", head_start)
    assert not any(one.crash for one in ended), ended
    assert len([one for one in ended if one.line]) == 1, ended
    assert (at.output / "search.json").exists() or content(at.output) == content(at.done)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("first", "second"), [rarely("add first", "add second"), ("report", "add first"), rarely("report", "report")])
def test_two_that_write_into_a_finished_folder(first: str, second: str, folders: Path, tmp_path: Path) -> None:
    at = place(folders, tmp_path)
    shutil.copytree(at.done, at.output)
    ended = raced(at, first, second, 0.0)
    assert ended == [Ended(), Ended()]
    record = files.read(at.output).metrics.as_dict().get("compressed", {})
    assert ("perplexity" in record) == ("add first" in (first, second))
    assert ("size" in record) == (second == "add second")
    if first == "report":
        assert (at.output / "report.html").read_text().rstrip().endswith("</html>")
    assert not [path.name for path in at.output.iterdir() if path.name.startswith(".")]
