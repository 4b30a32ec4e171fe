"""Progress: the time left is what was expected, corrected by what is seen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aerogel.engine.progress import Event, ProgressEstimator, Watch, bar
from tests.clocks import Manual


@pytest.fixture
def clock() -> Manual:
    return Manual()


@pytest.fixture
def estimator(clock: Manual) -> ProgressEstimator:
    return ProgressEstimator({"load": 2.0, "compress": 40.0, "save": 8.0}, clock)


def test_before_anything_is_seen_the_plan_counts(estimator: ProgressEstimator) -> None:
    estimator.see(Event("load", 0, 1))
    assert estimator.left() == 50.0
    assert estimator.share() == 0.0


def test_a_pace_that_is_seen_replaces_the_plan(estimator: ProgressEstimator, clock: Manual) -> None:
    estimator.see(Event("load", 0, 1))
    clock.seconds += 4.0
    estimator.see(Event("compress", 0, 10))
    assert estimator.left() == 48.0
    clock.seconds += 30.0
    estimator.see(Event("compress", 5, 10))
    assert estimator.left() == pytest.approx(30.0 + 8.0)
    assert estimator.share() == pytest.approx(34.0 / 72.0)


def test_what_is_done_inside_a_part_counts_and_never_goes_back(estimator: ProgressEstimator, clock: Manual) -> None:
    estimator.see(Event("compress", 0, 2))
    clock.seconds += 10.0
    estimator.see(Event("compress", 0, 2, inside=0.5))
    assert estimator.left() == pytest.approx(30.0 + 2.0 + 8.0)
    clock.seconds += 10.0
    estimator.see(Event("compress", 0, 2, inside=0.1))  # the next fit of the same block
    assert estimator.share() > 0.2


def test_a_pace_is_trusted_by_degrees(estimator: ProgressEstimator, clock: Manual) -> None:
    estimator.see(Event("compress", 0, 10))
    clock.seconds += 20.0
    estimator.see(Event("compress", 1, 10))
    slow, planned = 20.0 / 0.1 * 0.9, 40.0 * 0.9
    assert estimator.left() == pytest.approx(0.5 * slow + 0.5 * planned + 2.0 + 8.0)


def test_a_resumed_run_is_paced_by_what_it_does_itself(estimator: ProgressEstimator, clock: Manual) -> None:
    estimator.see(Event("compress", 8, 10))
    clock.seconds += 5.0
    estimator.see(Event("compress", 9, 10))
    assert estimator.left() == pytest.approx(0.5 * 5.0 + 0.5 * 4.0 + 2.0 + 8.0)


def test_better_expectations_come_with_an_event(estimator: ProgressEstimator) -> None:
    estimator.see(Event("load", 1, 1, expected={"compress": 400.0}))
    assert estimator.left() == 408.0


def test_a_watch_announces_and_times() -> None:
    seen: list[Event] = []
    clock = Manual()
    watch = Watch(seen.append, clock)
    with watch.stage("save", "somewhere"):
        clock.seconds += 1.25
    assert seen == [Event("save", 0, 1, "somewhere")]
    assert watch.seconds == {"save": 1.25}


def test_the_bar_says_stage_block_and_time_left(estimator: ProgressEstimator, clock: Manual) -> None:
    screen = io.StringIO()
    with bar(Console(file=screen, force_terminal=True, width=120), estimator) as tell:
        tell(Event("load", 0, 1))
        clock.seconds += 10
        tell(Event("compress", 2, 30, "model.layers.2"))
    assert "compress 3/30 model.layers.2" in screen.getvalue()
    assert "s left" in screen.getvalue()
