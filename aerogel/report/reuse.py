"""Which parts of a denoiser are reused at which steps: a map of units by steps, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from aerogel.report.heat import cell
from aerogel.report.phrases import digits, percent
from aerogel.report.record import Reuse
from aerogel.report.svg import element, image, label
from aerogel.report.temporal import short

FOOT = 22.0
"""Below the rows, for the steps."""
_WORK = {0.0: "reused", 1.0: "runs"}


def reuse_map(found: Reuse, width: float = 960) -> Markup:
    """Draw a cell for every unit at every step, filled where it runs."""
    return work_map(found.steps, found.units, [[float(one) for one in row] for row in found.computed], width)


def work_map(steps: Sequence[float], units: Sequence[str], done: Sequence[Sequence[float]], width: float = 960) -> Markup:
    """Draw a cell for every unit at every step, the fuller the larger the share of its work that is done there."""
    names = short(units)
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
            said = f"{units[row]}, step {step:g}: {_WORK.get(share) or f'{percent(share)} of its work'}"
            box = {"x": left + column * wide, "y": y + 1, "width": wide - gap, "height": pitch - 2}
            drawn.append(cell(0.75 * share, 1.0, said, **box))
    foot = len(names) * pitch + 14
    drawn += [label(left, foot, f"step {steps[0]:g}", "small"), label(width, foot, f"{steps[-1]:g}", "small", "end")]
    return image(width, len(names) * pitch + FOOT, "Which parts run at which step", element("g", *drawn))


def sentence(found: Reuse) -> str:
    """What the map comes to."""
    whole = sum("1" not in row for row in found.computed)
    said = (
        f"Of {len(found.units)} parts and {len(found.steps)} steps of {found.sampler or 'the sampler'} {percent(found.share)} are reused; "
        f"{whole or 'no'} {'step reuses' if whole < 2 else 'steps reuse'} everything."
    )
    if found.error is None:
        return said
    return f"{said} Final images of other noise move by {digits(found.error)} (mean square)."
