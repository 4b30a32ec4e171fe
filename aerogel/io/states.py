"""Runtime policies in a saved folder: names and options in aerogel.json, tensors beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aerogel.errors import AerogelError, reason_of
from aerogel.io.record import files

STATES = "aerogel/policies.safetensors"
"""In a folder of its own: engines read every *.safetensors beside the weights as weights."""
_OF_BEFORE = "aerogel.safetensors"
FILES = (STATES, _OF_BEFORE)
"""Names that releases of this package have given it."""


def file_in(folder: Path) -> str | None:
    """Return the name of the file with the tensors of a folder's policies; None where it has none."""
    return next((name for name in FILES if (folder / name).exists()), None)


def stored(folder: Path) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield ({name: options}, state) of each policy in the order in which they are put on; nothing when the folder has none.

    Raises AerogelError for a folder with tensors of policies and no record that says which these are.
    """
    name, recorded = file_in(folder), (folder / files.FILE).exists()
    if name is not None and not recorded:
        raise AerogelError(f"{folder} has runtime policies ({name}) and no {files.FILE} that says which; copy the folder again")
    policies = files.read(folder).policies if recorded else []
    tensors = _read(folder / name) if name is not None else {}
    for number, policy in enumerate(policies):
        own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(number)}
        yield policy.step, {**policy.state, **own}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():  # a pipe would be waited for
        raise AerogelError(f"{path} is no regular file; copy the folder again")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AerogelError(f"{path} cannot be read ({reason_of(error)}); copy the folder again, or compress again") from error
