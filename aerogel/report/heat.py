"""Parts of all heat maps: a cell whose shade is its value, and the colour scale."""

from __future__ import annotations

import math

from markupsafe import Markup

from aerogel.report.svg import element, label

LEAST = 0.06
"""Shade of a zero: a cell stays visible."""


def shade(value: float, top: float) -> str:
    """Return the opacity of a value, full at `top` and for values that are not finite."""
    share = min(value / top, 1.0) if math.isfinite(value) else 1.0
    return f"{LEAST + (1 - LEAST) * share:.3f}"


def cell(value: float, top: float, words: str, **box: object) -> Markup:
    """Return a cell of a map with its words, if any, as a tooltip."""
    return element("rect", *([element("title", words)] if words else []), **box, class_="heat", fill_opacity=shade(value, top))


def legend(x: float, y: float, low: str, high: str) -> Markup:
    """Draw six shades between the labels of the lowest and of the highest value."""
    start = x + 8 + 7 * len(low)
    steps = [
        element("rect", x=start + 16 * n, y=y - 9, width=14, height=10, rx=2, class_="heat", fill_opacity=shade(n, 5)) for n in range(6)
    ]
    return element("g", label(x, y, low, "small"), *steps, label(start + 104, y, high, "small"))
