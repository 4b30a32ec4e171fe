"""Progress of a whole run: events for machines, one bar with a believable time left for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

StageName = Literal["load", "check", "compress", "save", "evaluate"]
STAGES: tuple[StageName, ...] = ("load", "check", "compress", "save", "evaluate")
# Shares of a run before anything is known about it; `plan` gives better ones.
_GUESS: Mapping[StageName, float] = {"load": 3.0, "check": 2.0, "compress": 60.0, "save": 3.0, "evaluate": 30.0}

_WIDTH = 44


@dataclass(frozen=True)
class Event:
    """One step of a run: `done` of `total` parts of a stage are finished, and what is in hand now."""

    stage: StageName
    done: int
    total: int
    what: str = ""
    expected: Mapping[StageName, float] | None = None
    """Seconds that stages are expected to take, when that has become known."""
    inside: float = 0.0
    """Finished share of the part in hand, 0 to 1."""

    @property
    def share(self) -> float:
        """Return the finished share of the stage, 0 to 1."""
        return (self.done + self.inside) / self.total if self.total else 1.0


Tell = Callable[[Event], None]


class ProgressEstimator:
    """Finished share of a run and seconds that remain, from expected seconds a stage corrected by those measured."""

    def __init__(self, expected: Mapping[StageName, float] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._expected = dict(expected or _GUESS)
        self._now = now
        self._began: dict[StageName, float] = {}
        self._resumed: dict[StageName, float] = {}
        self._share = 0.0
        self._left = 0.0
        self._at = now()

    def see(self, event: Event) -> None:
        """Take in an event."""
        now = self._now()
        self._expected.update(event.expected or {})
        if event.stage not in self._began:
            self._finish_current(now)
            self._began[event.stage] = now
            # A resumed run begins in the middle; only what is done from here on tells its pace.
            self._resumed[event.stage] = event.share if event.total else 0.0
            self._share = 0.0
        self._share = max(self._share, event.share)  # a part that holds several fits begins anew with each
        self._left = self._left_here(now)
        self._at = now

    def share(self) -> float:
        """The part of the whole run that is done, 0 to 1."""
        total = self._past() + self.left()
        return min(1.0, self._past() / total) if total else 1.0

    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._left - (self._now() - self._at)) + self._left_later()

    @property
    def _current(self) -> StageName | None:
        return next(reversed(self._began), None)

    def _finish_current(self, now: float) -> None:
        if self._current is not None:
            self._expected[self._current] = now - self._began[self._current]

    def _past(self) -> float:
        return self._now() - next(iter(self._began.values())) if self._began else 0.0

    def _left_here(self, now: float) -> float:
        """Seconds left of the current stage as they look at an event."""
        stage = self._current
        assert stage is not None
        seen = self._share - self._resumed[stage]
        expected = self._expected.get(stage, 0.0) * (1 - self._share)
        if seen <= 0:
            return expected
        measured = (now - self._began[stage]) / seen * (1 - self._share)
        # Trust in the measured pace grows as the stage does.
        trust = min(1.0, 5 * seen)
        return trust * measured + (1 - trust) * expected

    def _left_later(self) -> float:
        return sum(seconds for stage, seconds in self._expected.items() if stage not in self._began)


class Watch:
    """Announces stages and times them."""

    def __init__(self, tell: Tell, now: Callable[[], float] = time.monotonic) -> None:
        self.tell = tell
        self._now = now
        self.seconds: dict[StageName, float] = {}

    @contextmanager
    def stage(self, name: StageName, what: str = "", expected: Mapping[StageName, float] | None = None) -> Iterator[None]:
        """Time a stage that runs within the context."""
        self.tell(Event(name, 0, 1, what, expected))
        start = self._now()
        yield
        self.seconds[name] = round(self._now() - start, 3)


class _Left(ProgressColumn):
    """The time left, counted down between events."""

    def __init__(self, clock: ProgressEstimator) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        minutes, seconds = divmod(round(self._clock.left()), 60)
        return Text(f"{minutes} min {seconds:02} s left" if minutes else f"{seconds} s left")


@contextmanager
def bar(console: Console, clock: ProgressEstimator) -> Iterator[Tell]:
    """Show one bar for the whole run on this console while the context lasts; gives what to tell events to."""
    columns = (TextColumn(f"{{task.description:<{_WIDTH}}}"), BarColumn(), TaskProgressColumn(), _Left(clock))
    with Progress(*columns, console=console, refresh_per_second=2, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=1.0)

        def tell(event: Event) -> None:
            clock.see(event)
            count = f" {min(event.done + 1, event.total)}/{event.total}" if event.stage == "compress" and event.what else ""
            shown.update(task, completed=clock.share(), description=f"{event.stage}{count} {event.what}"[:_WIDTH], refresh=True)

        yield tell
