"""The model card of a compressed folder: README.md with the metadata that the Hugging Face hub reads, the measures and the recipe."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import yaml

from aerogel.io.record.schema import Record
from aerogel.report import compare, phrases

_USE = {
    "transformers": """from transformers import {auto}, {processor}

model = {auto}.from_pretrained("{name}")
processor = {processor}.from_pretrained("{name}")""",
    "diffusers": """import aerogel
from diffusers import DiffusionPipeline

aerogel.register_diffusers()
pipeline = DiffusionPipeline.from_pretrained("{name}")""",
    "aerogel": """import aerogel

model = aerogel.load("{name}")""",
}
_CLASSES = {"text": ("AutoModelForCausalLM", "AutoTokenizer"), "image-text": ("AutoModelForImageTextToText", "AutoProcessor")}
LIBRARIES = tuple(_USE)
"""Libraries that a card can say a folder is opened with."""


def card(run: Record, name: str, library: str, modality: str = "text") -> str:
    """Return the card of a run that is pushed as owner/name; `library` is the one of LIBRARIES that opens a model of this modality."""
    header = yaml.safe_dump(_metadata(run, library), sort_keys=False, allow_unicode=True)
    steps = yaml.safe_dump({"name": run.recipe.name, "steps": run.recipe.steps}, sort_keys=False, width=120, allow_unicode=True)
    auto, processor = _CLASSES.get(modality, _CLASSES["text"])
    parts = [
        f"---\n{header}---",
        f"# {name.rpartition('/')[2]}",
        phrases.headline(run),
        _table(run),
        f"## Use\n\n```python\n{_USE[library].format(name=name, auto=auto, processor=processor)}\n```",
        f"## Recipe\n\n{_provenance(run)}\n\n```yaml\n{steps}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(run: Record, library: str) -> dict[str, Any]:
    """Settings that the hub reads; the base model only where the model came from there."""
    found: dict[str, Any] = {}
    if run.model.revision is not None:
        found["base_model"] = run.model.name
        if run.coverage is not None and run.coverage.any:
            found["base_model_relation"] = "quantized"
    methods = dict.fromkeys(method for step in run.recipe.steps for method in step)
    return {**found, "library_name": library, "tags": ["aerogel", *methods]}


def _table(run: Record) -> str:
    rows = list(compare.rows(run.metrics.original, run.metrics.compressed))
    lines = ["| | original | compressed | |", "|---|--:|--:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) if rows else ""


def _provenance(run: Record) -> str:
    given = run.provenance.calibration
    size = " x ".join(str(given[key]) for key in ("count", "length") if given.get(key) is not None)
    source = PurePath(str(given["source"])).name if given.get("source") else ""
    calibrated = f", calibrated on {source}{f' ({size})' if size else ''}" if source else ""
    version = run.provenance.versions.get("aerogel", "of unknown version")
    return f"Made with Aerogel {version}{calibrated}, seed {run.provenance.seed}; `aerogel.json` has all options and measures."
