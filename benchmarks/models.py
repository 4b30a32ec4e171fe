"""Architectures that transformers and diffusers build tiny: what is found in them, and how far GPTQ takes them.

python benchmarks/models.py             # every type, about half an hour on one core
python benchmarks/models.py CASE ...    # some, as `causal-llama`, printed only
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import results
import torch

from aerogel.engine.opening import open_model
from aerogel.engine.structure import structure_of
from tests.architectures.cases import Case, cases
from tests.architectures.through import RECIPES, Row, through

NAMES = {
    "causal": "language", "image-text": "vision-language", "audio-text": "audio-language", "seq2seq": "encoder-decoder",
    "denoiser": "diffusion",
}  # fmt: skip
WORKS = {
    "same": "yes",
    "open": "yes, in transformers after `register_transformers()`",
    "register": "in aerogel only",
    "load": "no",
    "compress": "no",
    "build": "not built here",
}


def main(chosen: Sequence[str]) -> None:
    """Measure, and write benchmarks/results/models.json where all are measured."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table, counts = [], dict[str, list[int]]()
    for case in cases():
        if chosen and str(case) not in chosen:
            continue
        row = through(case, RECIPES["gptq"])
        table.append([case.name, NAMES[case.kind], WORKS[row.stage], *_structure(case, row), _reason(row)])
        total = counts.setdefault(NAMES[case.kind], [0, 0, 0, 0])
        total[0] += 1
        total[1] += row.stage in ("same", "open", "register")
        total[2] += row.stage in ("same", "open")
        total[3] += row.stage == "same"
        sys.stderr.write(f"{case}: {table[-1][2:]}\n")
    notes = ["Each is built tiny from its configuration class with random weights; nothing is known about it beforehand."]
    for kind, (types, here, there, alone) in counts.items():
        by_itself = "" if kind == NAMES["denoiser"] else f", {alone} in transformers by itself"
        notes.append(
            f"{kind}: of {types} types {here} answer as before after `aerogel.load`, {there} in their library with our layers{by_itself}."
        )
    notes.append("AWQ edges: norms and layers whose channels can be scaled. Rotates: the residual stream can be rotated exactly.")
    columns = ["type", "kind", "saved, reopened, same answers", "AWQ edges", "rotates", "note"]
    title = "Architectures through GPTQ, 4 bits in groups of 32"
    if not chosen:
        results.write("models", title, {"recipe": "gptq W4A16_G32", "threads": 1}, columns, table, notes)


def _structure(case: Case, row: Row) -> list[Any]:
    """The number of edges and whether the stream rotates; a dash where the type is not built."""
    if row.stage == "build":
        return ["-", "-"]
    found = structure_of(open_model(case.make()))
    return [sum(len(kind["edges"]) * kind["count"] for kind in found["blocks"]), "no" if isinstance(found["residual"], str) else "yes"]


def _reason(row: Row) -> str:
    if row.stage == "same":
        return ""
    reason = row.reason.split(": ", 1)[-1]
    if "missing_keys" in reason and "experts" in reason:
        return "transformers has no converter from single experts to its fused ones"
    if "missing_keys" in reason and "weight_packed" in reason:
        return "transformers by itself quantizes no Conv1D"
    if "has no attribute" in reason and "weight" in reason:
        return "its _init_weights in transformers reads `.weight` of packed layers"
    return reason[:120]


if __name__ == "__main__":
    main(sys.argv[1:])
