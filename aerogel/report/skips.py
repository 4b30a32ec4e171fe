"""Dropped token-expert assignments: a map of layers by modality, and a sentence."""

from __future__ import annotations

from markupsafe import Markup

from aerogel.io.record.measures import SkippedExperts
from aerogel.report.heat import cell, legend
from aerogel.report.phrases import percent
from aerogel.report.svg import element, image, label

ROW, FOOT, LEFT = 22.0, 40.0, 132.0
_ROWS = ("Text", "Images", "No routed expert")


def skip_map(found: SkippedExperts, width: float = 960) -> Markup:
    """Draw a column for each MoE layer: shares of dropped assignments of text and of images, and of tokens without any expert."""
    shares = [*(list(one) for one in zip(*found.layers, strict=True)), found.dropped_tokens_by_layer]
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
    return image(width, len(_ROWS) * ROW + FOOT, "Dropped token-expert assignments, layer by layer", element("g", *drawn))


def sentence(found: SkippedExperts) -> str:
    """Say what the map shows."""
    return (
        f"{percent(found.prefill)} of the token-expert assignments were dropped in prefill and {percent(found.decode)} in decoding; "
        f"{percent(found.dropped_tokens)} of the tokens in a layer were processed by no routed expert."
    )
