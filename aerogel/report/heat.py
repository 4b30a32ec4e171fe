"""The pieces that our heat maps share: a cell whose shade is its value, and the scale that says which shade means what."""

from __future__ import annotations

import math

from markupsafe import Markup

from aerogel.report.svg import element, label

LEAST = 0.06
"""Shade of a zero: a cell stays visible."""


def shade(value: float, top: float) -> str:
    """The opacity of a value, of which `top` is the strongest; what is not finite is as strong as can be."""
    share = min(value / top, 1.0) if math.isfinite(value) else 1.0
    return f"{LEAST + (1 - LEAST) * share:.3f}"


def cell(value: float, top: float, words: str, **box: object) -> Markup:
    """A cell of a map; the pointer shows its words if there are any."""
    return element("rect", *([element("title", words)] if words else []), **box, class_="heat", fill_opacity=shade(value, top))


def legend(x: float, y: float, low: str, high: str) -> Markup:
    """Six shades between the words for none and for the most."""
    start = x + 8 + 7 * len(low)
    steps = [
        element("rect", x=start + 16 * n, y=y - 9, width=14, height=10, rx=2, class_="heat", fill_opacity=shade(n, 5)) for n in range(6)
    ]
    return element("g", label(x, y, low, "small"), *steps, label(start + 104, y, high, "small"))
