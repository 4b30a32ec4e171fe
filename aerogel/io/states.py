"""What a saved folder keeps of its runtime policies: names and options in aerogel.json, tensors beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from aerogel.io.older import renamed

FACTS = "aerogel.json"
STATES = "aerogel.safetensors"


def stored(folder: Path) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield ({name: options}, state) of each policy in the order in which they are put on; nothing when the folder has none."""
    path = folder / FACTS
    lines: Sequence[Mapping[str, Any]] = json.loads(path.read_text()).get("policies", []) if path.exists() else []
    tensors = load_file(folder / STATES) if (folder / STATES).exists() else {}
    for number, line in enumerate(lines):
        own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(number)}
        yield renamed(line["step"]), {**line["state"], **own}
