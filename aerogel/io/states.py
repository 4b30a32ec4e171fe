"""Runtime policies in a saved folder: names and options in aerogel.json, tensors beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from aerogel.io.record import files

STATES = "aerogel.safetensors"


def stored(folder: Path) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield ({name: options}, state) of each policy in the order in which they are put on; nothing when the folder has none."""
    policies = files.read(folder).policies if (folder / files.FILE).exists() else []
    tensors = load_file(folder / STATES) if (folder / STATES).exists() else {}
    for number, policy in enumerate(policies):
        own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(number)}
        yield policy.step, {**policy.state, **own}
