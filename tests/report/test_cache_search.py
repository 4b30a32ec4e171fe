"""The report of a search: every policy, the fewer-steps baseline, the work that is done, and why others are left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.report import cache_search, search
from aerogel.report.courses import Course, courses
from aerogel.report.reuse import work_map
from tests.report.runs import _PNGS as PNGS
from tests.report.test_page import read


def row(policy: str, speedup: float, error: float, **options: Any) -> dict[str, Any]:
    return {
        "policy": policy, "option": "interval", "value": 2, "step": {policy: {}}, "speedup": speedup, "error": error, "seconds": 12.0,
        "step_errors": [0.0, error / 2, error / 1.5, error], "ran": [[1.0, 1.0], [0.0, 0.25], [1.0, 1.0], [0.0, 0.0]],
        "images": [PNGS[1], PNGS[1]], "tries": [{"value": 2, "speedup": speedup, "seconds": 12.0}],
    } | options  # fmt: skip


def record(**facts: Any) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    return {
        "schema": 1,
        "task": "cache",
        "budget": 1.5,
        "model": {"name": "a <b>dit_pipeline</b>", "family": "dit", "parameters": 1000, "dtype": "float32", "fingerprint": "sha256:00"},
        "provenance": {"date": "2026-11-23T06:12:00+00:00", "seed": 0, "versions": {"aerogel": "0.1.0"}},
        "timings": {"compress": 60.0},
        "sampler": "DDIMScheduler",
        "steps": [900.0, 600.0, 300.0, 0.0],
        "modules": ["blocks.0.<b>attn</b>", "blocks.0.ff"],
        "guidance": 1.5,
        "count": 64,
        "batch": 8,
        "rounds": 3,
        "seconds": 2.0,
        "variance": 0.49,
        "rows": [
            row("schedule_search", 1.52, 0.01),
            row("fora", 1.9, 0.02),
            row("uniform_cache", 1.6, 0.03),
            row("wild", 1.7, float("nan")),
        ],
        "fewer": {"policy": "fewer steps", "option": "steps", "value": 3, "speedup": 1.55, "error": 0.05, "images": [PNGS[0], PNGS[1]]},
        "without_fewer": "",
        "left_out": [{"policy": "<b>pab</b>", "reason": "too slow for <i>this</i>", "tries": []}],
        "images": [PNGS[0], PNGS[0]],
        "subjects": ["a <b>bag</b>", "boot"],
    } | facts


def parsed(**facts: Any) -> cache_search.Search:
    return cache_search.Search.model_validate(record(**facts))


def rendered(**facts: Any) -> Any:
    return read(search.page(record(**facts)))


def test_everything_is_said() -> None:
    words = rendered().words
    for said in (
        "a <b>dit_pipeline</b> is 1.52 times faster with schedule_search; the error of its final latents is 0.0100.",
        "4 of 5 policies reach 1.5 times the speed.",
        "Without a cache, 3 instead of 4 steps are 1.55 times faster; their error is 0.0500, 5.00 times as large.",
        "Errors over 64 images of held-out noise in 4 steps of DDIMScheduler with guidance 1.5.",
        "Speed at batch 8, 3 rounds with and without each policy, alternating; 2.0 s per run without.",
        "The latents' variance is 0.490.",
        "schedule_search interval 2 1.52 0.0100 1.0× 46.9 % 12 s",
        "fora interval 2 1.90 0.0200 2.0× 46.9 % 12 s",
        "fewer steps steps 3 1.55 0.0500 5.0× – –",
        "wild interval 2 1.70 not a number – 46.9 % 12 s",
        "<b>pab</b> too slow for <i>this</i>",
        "Schedule of schedule_search",
        "Error after each step ↓ better",
        "Error of the final latents ↓ better",
        "a <b>bag</b> boot",
        "2026-11-23 06:12:00 UTC",
        "compress 60 s",
    ):
        assert said in words, said
    html = search.page(record()).replace("\u202f", " ")
    for said in ("blocks.0.&lt;b&gt;attn&lt;/b&gt;, step 600: cached", "ff, step 600: 25.0 % of its work", "ff, step 300: computed"):
        assert said in html, said
    ranked = [line.policy for line in cache_search.lines(parsed())]
    assert ranked == ["schedule_search", "fora", "uniform_cache", "fewer steps", "wild"]


def test_it_fetches_nothing_and_escapes_everything() -> None:
    html = search.page(record())
    reader = read(html)
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r'"data:image/png;base64,[^"]*"', "", html))
    assert not {"script", "link", "iframe", "object", "b", "i"} & set(reader.seen)
    sources = [value for name, value in reader.attributes if name == "src"]
    assert len(sources) == 2 * 6, "the whole network, four policies, fewer steps"
    assert sources[:2] == [f"data:image/png;base64,{PNGS[0]}"] * 2


def test_the_frontier_joins_what_nothing_beats() -> None:
    """searched has less error, fora more speed; evenly and fewer steps have neither, wild no error that could be drawn."""
    drawn = str(cache_search.frontier_chart(parsed(), 956))
    assert drawn.count('class="move"') == 1
    assert [name for name in ("schedule_search", "fora", "uniform_cache", "3 steps") if f"{name}: " not in drawn] == []
    assert "wild" not in drawn
    assert drawn.count('class="this"') == drawn.count('class="original"') == 1


def test_fewer_steps_that_are_better_are_said_so() -> None:
    better = record()["fewer"] | {"error": 0.004}
    assert "their error is 0.00400, 0.400 times as large: no policy is better here." in rendered(fewer=better).words


def test_a_search_that_found_nothing_says_why() -> None:
    words = rendered(rows=[], fewer=None, without_fewer="it knows one step only", images=[], subjects=[]).words
    assert "No policy makes a <b>dit_pipeline</b> 1.5 times faster." in words
    assert "0 of 1 policy reach 1.5 times the speed. Fewer steps do not: it knows one step only." in words
    assert "too slow for <i>this</i>" in words
    for absent in ("Error against speed", "Setting", "Schedule of", "Error by step", "Images from the same noise"):
        assert absent not in words
    assert "Error against speed" in rendered(rows=[]).words, "fewer steps alone"


def test_errors_of_nothing_and_policies_that_change_nothing_are_drawn() -> None:
    same = row("same", 1.5, 0.0)
    words = rendered(rows=[same]).words
    assert "the error of its final latents is 0." in words
    assert "their error is 0.0500." in words
    assert "–" in next(cache_search.lines(parsed(rows=[same]))).times


@pytest.mark.parametrize("width", [956.0, 328.0])
def test_courses_stay_inside_and_their_names_apart(width: float) -> None:
    lines = [Course(f"policy {number}", [0.0, 1e-4, 1e-3 * (1 + number / 1000)], number == 3) for number in range(8)]
    drawn = str(courses([*lines, Course("3 steps", [0.01]), Course("wild", [float("nan")] * 3)], "Error", width=width))
    for path in re.findall(r'points="([^"]+)"', drawn):
        for point in path.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= 360
    places = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>(?:policy|3 steps)', drawn))
    assert len(places) == 9
    assert all(after - before >= 15 for before, after in pairwise(places))
    assert drawn.count("path-best") == 1
    assert drawn.count("<circle") == 1


def test_the_map_of_a_schedule_is_that_of_its_work() -> None:
    drawn = str(work_map([9.0, 4.0], ["a.x", "a.y"], [[1.0, 1.0], [0.0, 0.5]]))
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"', drawn)]
    assert shades == pytest.approx([0.765, 0.06, 0.765, 0.4125], abs=1e-3), "row after row"


def test_it_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps(record()))
    code = f"import sys; from aerogel.report.search import write; print(write({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "report.html"


def test_a_changed_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"search\.json is missing; give a folder that `aerogel search` wrote"):
        search.write(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps(record(images=['x" onerror="alert(1)'])))
    with pytest.raises(AerogelError, match=r"search\.json: images\.0: string should match pattern"):
        search.write(tmp_path)
