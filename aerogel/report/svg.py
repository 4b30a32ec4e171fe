"""The few pieces that our figures are drawn with: escaped elements, a scale with round ticks, a whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

PALETTE = (Path(__file__).parent / "palette.css").read_text("utf-8")
"""Colours and type of all figures, for light and dark surroundings."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """An element; `_` in attribute names stands for `-`, a trailing one is dropped, numbers are shortened, all else is escaped."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for name, value in attributes.items())
    return Markup(f"<{tag}{given}>{Markup('').join(children)}</{tag}>")  # noqa: S704  # every piece of it is escaped above


def label(x: float, y: float, content: str, class_: str = "", anchor: str = "start", **attributes: object) -> Markup:
    """A line of text."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def image(width: float, height: float, title: str, *children: str) -> Markup:
    """A whole figure, for a page that has the palette."""
    box = {"viewBox": f"0 0 {_short(width)} {_short(height)}", "width": width, "height": height}
    return element("svg", element("title", title), *children, **box, class_="figure", role="img")


def document(images: Sequence[Markup], width: float, height: float, margin: float = 20.0) -> Markup:
    """Figures of one size side by side as a file of its own, with the colours for light and dark surroundings."""
    across, down = len(images) * (width + margin) + margin, height + 2 * margin
    style = Markup("<style>" + PALETTE + "</style>")  # noqa: S704  # our own file
    surface = element("rect", width=across, height=down, class_="figure surface")
    placed = [element("svg", drawn, x=margin + index * (width + margin), y=margin) for index, drawn in enumerate(images)]
    box = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {_short(across)} {_short(down)}", "width": across, "height": down}
    return element("svg", style, surface, *placed, **box)


@dataclass(frozen=True)
class Scale:
    """Values to places along an axis: equal steps, or equal ratios when `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        """About `wanted` round values inside the scale."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            rounds = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            return [tick for power in decades for step in rounds if self.low <= (tick := step * 10.0**power) <= self.high]
        rough = (self.high - self.low) / wanted or 1
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
