"""Bytes of the weights by kind of module: one bar for each model, on one scale."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from aerogel.report.phrases import size
from aerogel.report.svg import element, image, label

THICK, PITCH = 22.0, 46.0
SHADES = {"quantized layers": "part-1", "unquantized layers": "part-2", "embeddings": "part-3"}
"""Parts that look the same in every report; all others share one shade."""


def parts_bars(networks: Mapping[str, Mapping[str, int]], width: float = 960) -> Markup:
    """Draw name of model -> part -> bytes, with a legend of all parts."""
    names = sorted({part for parts in networks.values() for part in parts}, key=lambda part: SHADES.get(part, "part-4"))
    shades = {name: SHADES.get(name, "part-4") for name in names}
    longest = max(sum(parts.values()) for parts in networks.values()) or 1
    scale = (width - 80) / longest
    drawn = []
    for row, (network, parts) in enumerate(networks.items()):
        x, y = 0.0, row * PITCH + 18
        drawn.append(label(0, y - 5, network, "small"))
        for part, count in sorted(parts.items(), key=lambda item: names.index(item[0])):
            drawn.append(
                element(
                    "rect",
                    element("title", f"{part}: {size(count)}"),
                    x=x,
                    y=y,
                    width=max(count * scale - 1, 0.5),
                    height=THICK,
                    class_=shades[part],
                )
            )
            x += count * scale
        drawn.append(label(x + 8, y + THICK / 2 + 4, size(sum(parts.values()))))
    x, y = 0.0, len(networks) * PITCH + 24
    for name in names:
        reach = 34 + 6.4 * len(name)
        if x and x + reach > width:
            x, y = 0.0, y + 20
        drawn += [element("rect", x=x, y=y - 10, width=12, height=12, rx=2, class_=shades[name]), label(x + 18, y, name, "small")]
        x += reach
    return image(width, y + 10, "Size by kind of module", *drawn)
