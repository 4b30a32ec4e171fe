"""Images of what was measured: bars in groups, one SVG for a results document, drawn anew by results.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

COLOURS = {"rtn": "#b9bec5", "awq": "#7fb2d9", "gptq": "#0b62a8"}
PLAIN = "#0b62a8"


@dataclass(frozen=True)
class Plot:
    """Which columns of a document are drawn: the names of bars and what they are as long as."""

    names: tuple[str, ...]
    value: str
    unit: str
    log: bool = False
    skip: tuple[Any, ...] = ()
    """Rows whose first or second cell is one of these."""


PLOTS = {
    "quality": Plot(("weights", "scheme", "method"), "nats lost", "nats per token above the original, lower is better", True, ("float",)),
    "gptq_rivals": Plot(("GPTQ W4 g64 symmetric", "sequences"), "seconds", "seconds for the whole model, lower is better", skip=("float",)),
    "memory": Plot(("recipe", "blocks"), "peak MB above the interpreter", "peak MB above the interpreter, lower is better"),
    "generation": Plot(("engine",), "tok/s", "tokens per second, higher is better"),
    "expert_skipping": Plot(
        ("target ratio", "policy"), "KL, nats per answer token", "KL divergence, nats per answer token, lower is better", True
    ),
    "expert_speed": Plot(
        ("phase", "variant"), "speed-up over the fastest stock", "speed-up over the fastest stock implementation, higher is better"
    ),
    "decode": Plot(("model",), "decode tok/s", "tokens per second in decoding, higher is better"),
}


def draw(name: str, document: dict[str, Any], path: Path) -> None:
    """Write the image of a results document as an SVG that is the same for the same numbers."""
    plot, columns = PLOTS[name], document["columns"]
    rows = [row for row in document["rows"] if row[columns.index(plot.value)] is not None and not set(row[:2]) & set(plot.skip)]
    labels = ["  ".join(str(row[columns.index(column)]) for column in plot.names) for row in rows]
    values = [row[columns.index(plot.value)] for row in rows]
    colours = [next((COLOURS[cell] for cell in row if cell in COLOURS), PLAIN) for row in rows]
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(7.2, 0.7 + 0.27 * len(rows)), layout="constrained")
        bars = axes.barh(labels, values, color=colours, height=0.7, log=plot.log)
        axes.bar_label(bars, [f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in values], padding=3, color="#5c646e")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(plot.unit, color="#5c646e")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
