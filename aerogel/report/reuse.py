"""The schedule of a feature cache: a map of cached modules by steps, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from pydantic import Field, model_validator

from aerogel.io.record import files
from aerogel.io.record.part import OpenPart
from aerogel.io.record.schema import PolicyRecord
from aerogel.report.heat import cell
from aerogel.report.phrases import digits, percent
from aerogel.report.svg import element, image, label
from aerogel.report.temporal import short

FOOT = 22.0
"""Below the rows, for the steps."""
_WORK = {0.0: "cached", 1.0: "computed"}


class CacheSchedule(OpenPart):
    """The state of a feature cache with a fixed schedule: which cached modules compute at which steps."""

    policy: str = ""
    steps: list[float] = Field(min_length=1)
    modules: list[str] = Field(min_length=1)
    computed: list[str]
    """A line of 1 (computed) and 0 (cached) for each step."""
    sampler: str = ""
    error: float | None = None
    """Mean squared error of final latents of noise that it was not calibrated on."""

    @model_validator(mode="after")
    def _rectangular(self) -> CacheSchedule:
        if len(self.computed) != len(self.steps) or any(len(row) != len(self.modules) or set(row) - set("01") for row in self.computed):
            raise ValueError(f"a table of {len(self.steps)} steps and {len(self.modules)} cached modules was expected")
        return self

    @property
    def share(self) -> float:
        """Share of the outputs (steps x cached modules) that come from the cache."""
        return sum(row.count("0") for row in self.computed) / (len(self.steps) * len(self.modules))


def reuse_of(policy: PolicyRecord) -> CacheSchedule | None:
    """Return the schedule of a policy, if it has one."""
    if "computed" not in policy.state:
        return None
    name = next(iter(policy.step), "")
    return files.checked(CacheSchedule, {"policy": name, **policy.state}, f"{files.FILE}: state of {name}", "aerogel compress")


def reuse_map(found: CacheSchedule, width: float = 960) -> Markup:
    """Draw a cell for every cached module at every step, filled where it is computed."""
    return work_map(found.steps, found.modules, [[float(one) for one in row] for row in found.computed], width)


def work_map(steps: Sequence[float], modules: Sequence[str], done: Sequence[Sequence[float]], width: float = 960) -> Markup:
    """Draw a cell for every cached module at every step, the fuller the larger the share of its work that is computed there."""
    names = short(modules)
    pitch = 18.0 if len(names) <= 30 else 11.0
    left = 12 + 6.6 * max(map(len, names))
    wide = (width - left) / len(steps)
    gap = 1.0 if wide >= 5 else 0.0
    drawn = []
    for row, name in enumerate(names):
        y = row * pitch
        drawn.append(label(left - 10, y + pitch / 2 + 4, name, "small", "end"))
        for column, step in enumerate(steps):
            share = done[column][row]
            said = f"{modules[row]}, step {step:g}: {_WORK.get(share) or f'{percent(share)} of its work'}"
            box = {"x": left + column * wide, "y": y + 1, "width": wide - gap, "height": pitch - 2}
            drawn.append(cell(0.75 * share, 1.0, said, **box))
    foot = len(names) * pitch + 14
    drawn += [label(left, foot, f"step {steps[0]:g}", "small"), label(width, foot, f"{steps[-1]:g}", "small", "end")]
    return image(width, len(names) * pitch + FOOT, "Cached modules computed at each step", element("g", *drawn))


def sentence(found: CacheSchedule) -> str:
    """Say what the map shows."""
    whole = sum("1" not in row for row in found.computed)
    said = (
        f"Of {len(found.modules)} modules at {len(found.steps)} steps of {found.sampler or 'the sampler'}, {percent(found.share)} of the "
        f"outputs come from the cache; at {whole or 'no'} {'step' if whole < 2 else 'steps'} all of them do."
    )
    if found.error is None:
        return said
    return f"{said} The mean squared error of final latents from held-out noise is {digits(found.error)}."
