"""Provenance of a result: versions, machine, data; and the parts of aerogel.json about them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.layers.slots import slots
from aerogel.model.network import Network
from aerogel.version import __version__


def versions() -> dict[str, str]:
    """Return the releases that a result depends on."""
    return {"aerogel": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}}


def provenance_of(network: Network, seed: int, calibration: dict[str, Any]) -> Provenance:
    """Return when, with what and on what a run is made."""
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=seed,
        versions=versions(),
        machine=_machine(network),
        calibration=calibration,
        **({} if network.dequantized is None else {"dequantized": network.dequantized}),
    )


def _machine(network: Network) -> dict[str, str | int]:
    return {
        "device": str(network.device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def model_of(network: Network) -> ModelRecord:
    """Return what identifies the model."""
    parameters = {id(slot.tensor): slot.tensor.numel() for slot in slots(network.module) if isinstance(slot.tensor, nn.Parameter)}
    dtype = network.stored_dtype or next((p.dtype for p in network.module.parameters()), torch.float32)
    source = network.source
    opened: dict[str, Any] = {}
    if source is not None:
        opened = {"source": source.name, "revision": source.revision, "compute_dtype": dtype_name(source.dtype)}
    return ModelRecord(
        name=source.known_as if source else (network.origin.name if network.origin else type(network.module).__name__),
        family=network.family.name,
        parameters=sum(parameters.values()),
        dtype=dtype_name(dtype),
        **{key: value for key, value in opened.items() if value is not None},
    )


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return what a record calls a dtype: bfloat16, float16, float32."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )
