"""Arguments of vLLM in a file beside the weights, by which it does what a runtime policy does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aerogel.io.engines import vllm_takes

FILE = "vllm.yaml"
_ABOUT = "# Arguments by which vLLM does what the policies of this folder do: vllm serve FOLDER --config FOLDER/vllm.yaml\n"


def write(folder: Path, arguments: Mapping[str, Any], config: Any) -> None:
    """Write those arguments that vLLM takes for a model of this configuration; a file that the model came with is removed."""
    path = folder / FILE
    path.unlink(missing_ok=True)
    if vllm_takes(arguments, config):
        path.write_text(_ABOUT + yaml.safe_dump(dict(arguments), sort_keys=False), encoding="utf-8")


def are_in(folder: Path, arguments: Mapping[str, Any]) -> bool:
    """Return True where a folder has a file with all of these arguments; False where there are none, or the file cannot be read."""
    path = folder / FILE
    if not arguments or not path.is_file():
        return False
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and all(name in found and found[name] == value for name, value in arguments.items())
