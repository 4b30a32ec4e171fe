"""Other runs of the same model in sibling folders, which the report shows beside a run."""

from __future__ import annotations

from pathlib import Path

from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.io.record.schema import Record


def beside(folder: str | Path, run: Record) -> list[Record]:
    """Return runs in sibling folders that compressed the same model and were measured on the same data; unreadable ones are passed over."""
    found = []
    for path in sorted(Path(folder).resolve().parent.glob(f"*/{files.FILE}")):
        if path.parent == Path(folder).resolve():
            continue
        try:
            other = files.read(path.parent)
        except AerogelError:
            continue
        if other.model.name == run.model.name and _data(other) == _data(run):
            found.append(other)
    return found


def _data(run: Record) -> tuple[object, ...]:
    """Return what identifies the text, and the images with those that they are compared with."""
    text, images = run.metrics.compressed.perplexity, run.metrics.compressed.image_quality
    read = (text.fingerprint, text.length) if text else ()
    seen = (images.count, images.steps, images.guidance, images.seed, images.reference) if images else ()
    return (*read, *seen)
