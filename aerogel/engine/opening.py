"""Opening a network as it was saved, with its runtime policies on, or as its weights alone are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from aerogel import catalog
from aerogel.engine import policies, structure_file
from aerogel.io import load as weights
from aerogel.io.record import files
from aerogel.layers.linear import timestep_index_of
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device, Placement, find_device, fitting, move


class _PutOn(ExitStack):
    """The contexts of policies that are on for good: they live as long as the module, and a copy of it has none."""

    def __reduce__(self) -> tuple[type[_PutOn], tuple[()]]:
        return _PutOn, ()


def families() -> Sequence[Family]:
    """Return all known families in alphabetical order of their names."""
    return [catalog.find("families", name) for name in catalog.names("families")]


def open_model(
    source: Any,
    *,
    device: Device = AUTO,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    trust_remote_code: bool = False,
    unfuse_experts: bool = True,
    revision: str | None = None,
    dequantize: bool = False,
    merge_adapter: bool = False,
) -> Network:
    """Open a network without its runtime policies; the arguments are those of `load`."""
    found = find_device(device)
    network = weights.load(
        source,
        families(),
        device=found,
        dtype=dtype,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
        unfuse_experts=unfuse_experts,
        revision=revision,
        dequantize=dequantize,
        merge_adapter=merge_adapter,
    )
    if device != AUTO and network.device != found:
        _compute_on(network, found)
    if network.origin is not None and network is not source:
        structure_file.recall_time(network, network.origin)
    return network


def _compute_on(network: Network, device: torch.device) -> None:
    """Have a network computed on a device: a live module goes there block by block when it is needed, anything else right away."""
    if hasattr(network.processor, "components"):
        network.processor.to(device)
        network.placed = Placement.at(device)
    elif network.origin is not None:
        move(network.module, device)
        network.placed = Placement.at(device)
    else:
        network.placed = Placement(device, network.placement.storage)


def load(
    source: Any,
    *,
    device: Device = AUTO,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    trust_remote_code: bool = False,
    unfuse_experts: bool = True,
    revision: str | None = None,
    dequantize: bool = False,
    merge_adapter: bool = False,
) -> Network:
    """Open a network and put its runtime policies on for good.

    `source` is the name of a reference model, a Hugging Face or diffusers folder, a hub id, an `nn.Module`, a diffusers
    pipeline, or a pair (module, processor). `device` computes: the accelerator that torch reports by default, else the CPU; a live module
    is computed where its weights are, or given a device goes there block by block. With `lazy` the weights of blocks stay on disk where
    the checkpoint allows it; `network.checkpoint.materialise(network.module, device=network.device)` brings them in. `dtype` is what is
    computed in: by default the checkpoint's, or float32 on a CPU that has no instructions for it. `revision` is a branch, tag or commit
    of a model on the hub. With `trust_remote_code` Python files of the model are run where transformers has no class of its own. A live
    module's fused experts become linear layers in place, unless `unfuse_experts` is false, and so does Conv1D of transformers: save it by
    `Result.save`, not by its own `save_pretrained`. Weights in compressed-tensors become quantized layers, or floats with `dequantize`
    where `compress` did not write the folder; those in other quantized formats become floats. The files of a folder that `compress` wrote
    are compared with their checksums. Raises AerogelError when the source is not found, damaged, changed, pickled or of a type
    that its library does not know, and when the device is not here.
    """
    with fitting("the model"):
        network = open_model(
            source,
            device=device,
            dtype=dtype,
            lazy=lazy,
            trust_remote_code=trust_remote_code,
            unfuse_experts=unfuse_experts,
            revision=revision,
            dequantize=dequantize,
            merge_adapter=merge_adapter,
        )
    if network is not source and (index := timestep_index_of(network.module)) is not None:
        index.set_pipeline(network.processor)
    if network is not source and network.origin is not None:
        files.verify(network.origin)
    if network is not source and (found := policies.load(network.origin, network.in_memory)):
        contexts = _PutOn()
        contexts.enter_context(policies.on(network, found))
        network.module.__dict__["_aerogel_policies"] = contexts
    return network
