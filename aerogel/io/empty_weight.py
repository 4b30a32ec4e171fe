"""A tensor without values under the name of a weight that is stored under other names.

transformers passes over a `quant_method` that it does not know with a warning, and would go on with random values for such weights.
It refuses the size of this tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Dequantize, Dequantized, OnDisk
from aerogel.layers.replacement import Replacement
from aerogel.layers.slots import slots

KEY = "empty_weight"
"""The entry of quantization_config that names it."""


def missing_weight(module: nn.Module) -> str | None:
    """Return the name of the first weight of a layer that only this package knows which the layer stores under other names."""
    stored = {slot.name for slot in slots(module)}
    layers = (name for name, part in module.named_modules() if isinstance(part, Replacement) and part.describe() is not None)
    return next((weight for name in layers if (weight := f"{name}.weight") not in stored), None)


def tensor() -> Tensor:
    """Return it."""
    return torch.empty(0)


def reader(config: Mapping[str, Any], where: Path) -> Dequantize | None:
    """Return what keeps a checkpoint from answering to it; None where the quantization_config of the file `where` names none."""
    return partial(_leave_out, where, name) if (name := config.get(KEY)) else None


def _leave_out(where: Path, name: str, on_disk: OnDisk) -> dict[str, Dequantized | None]:
    if name not in on_disk.entries or on_disk.entries[name].bytes:
        raise AerogelError(f"{where}: {name} is the {KEY}, and no tensor without values in the weights; get the files of one model")
    return {name: None}
