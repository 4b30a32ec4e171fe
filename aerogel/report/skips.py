"""Which experts were spared: a map of layers by modality, and a sentence."""

from __future__ import annotations

from markupsafe import Markup

from aerogel.report.heat import cell, legend
from aerogel.report.phrases import percent
from aerogel.report.record import Skipped
from aerogel.report.svg import element, image, label

ROW, FOOT, LEFT = 22.0, 40.0, 132.0
_ROWS = ("Text", "Images", "No expert at all")


def skip_map(found: Skipped, width: float = 960) -> Markup:
    """Draw a column for every layer with routed experts: how many pairs of text and of images were dropped, and tokens that lost all."""
    shares = [*(list(one) for one in zip(*found.layers, strict=True)), found.lost_of_layers]
    wide = (width - LEFT) / len(found.layers)
    gap = 1.0 if wide >= 5 else 0.0
    drawn = []
    for row, (name, values) in enumerate(zip(_ROWS, shares, strict=True)):
        drawn.append(label(LEFT - 10, row * ROW + ROW / 2 + 4, name, "small", "end"))
        for layer, share in enumerate(values):
            box = {"x": LEFT + layer * wide, "y": row * ROW + 1, "width": wide - gap, "height": ROW - 2}
            drawn.append(cell(share, 1.0, f"{name}, layer {layer}: {percent(share)}", **box))
    foot = len(_ROWS) * ROW + 14
    drawn += [label(LEFT, foot, "first layer", "small"), label(width, foot, "last", "small", "end")]
    drawn.append(legend(LEFT, foot + 20, "none", "all"))
    return image(width, len(_ROWS) * ROW + FOOT, "Experts skipped, layer by layer", element("g", *drawn))


def sentence(found: Skipped) -> str:
    """What the map comes to."""
    return (
        f"Of all pairs of token and expert {percent(found.prefill)} were dropped in prompts and {percent(found.decode)} while replies were "
        f"written; {percent(found.lost)} of the tokens in a layer lost all of their routed experts."
    )
