"""Saving: a folder that appears whole or not at all, with the weights, the configuration and everything beside them."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from aerogel.errors import AerogelError, reason_of
from aerogel.io import empty_weight, engine_arguments
from aerogel.io.fingerprint import fingerprint
from aerogel.io.json_files import read_object
from aerogel.io.layouts import as_on_disk
from aerogel.io.quantized import configs_in, describe
from aerogel.io.shards import write_shards
from aerogel.io.states import FILES
from aerogel.layers.replacement import Replacement
from aerogel.layers.slots import slots
from aerogel.model.denoisers import entries
from aerogel.model.network import Network

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot")
_OURS = ("aerogel.json", "report.html", "aerogel.structure.json")
# Settings of GPTQ and AWQ beside config.json: they say how the weights were quantized where the model comes from.
_OF_QUANTIZERS = ("quantize_config.json", "quant_config.json")
# Not properties of the model: where it was opened from, by what, and in which dtype it was computed.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "_attn_implementation")
_SPARE = 64 << 20
_OS_ERROR = re.compile(r"\(os error (\d+)\)$")
_SAVING = "saving"


class DiskError(AerogelError):
    """A folder that could not be saved because the disk failed, or is full."""


def preflight(output: Path, needed_bytes: int = 0, origin: Path | None = None) -> None:
    """Make sure that a folder of `needed_bytes` can be saved as `output`; raises AerogelError that says what is in the way.

    Nothing is left behind. `origin` is the folder the model comes from, which is never written to.
    """
    output = output.absolute()
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise AerogelError(f"{output}: exists and is not a folder; give the name of a new one")
    if output.is_dir() and any(output.iterdir()):
        raise AerogelError(f"{output}: this folder exists and is not empty; remove it or give another name")
    if origin is not None and origin.resolve() in (output.resolve(), *output.resolve().parents):
        raise AerogelError(f"{output}: lies in the folder the model comes from, which is not changed; give a place outside {origin}")
    parent = next(folder for folder in output.parents if folder.exists())
    probe = _beside(parent / output.name, "testing")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise AerogelError(f"{parent}: cannot write here ({error.strerror}); give an output folder in another place") from error
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + _SPARE:
        raise AerogelError(f"{parent}: {_gb(free)} free, about {_gb(needed_bytes + _SPARE)} needed; free disk space or give another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name when the context ends well, and is removed when it does not.

    Raises AerogelError when the disk fails or `output` is not empty.
    """
    output = output.absolute()
    partial = _beside(output, _SAVING)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        with _in_use(partial):
            _remove_leftovers(output)
            yield partial
            _sync(partial)
            _take_name(partial, output)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{output}: could not be saved ({reason_of(error)}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial: Path, output: Path) -> None:
    try:
        partial.rename(output)
    except OSError as error:
        if output.is_dir() and any(output.iterdir()):
            raise AerogelError(f"{output}: this folder is not empty any more, another process has written it; give another name") from error
        raise
    _sync_one(output.parent)


@contextmanager
def _in_use(partial: Path) -> Iterator[None]:
    """Mark a folder as one that a living process writes: the mark goes with the process, however that ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(output: Path) -> None:
    """Remove what processes that were killed while they saved the same output have left."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.*.{_SAVING}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


@dataclass(frozen=True)
class Extras:
    """Additions of runtime policies to what is saved, by which engines do the same."""

    entries: Mapping[str, Any] = field(default_factory=dict)
    """Entries of quantization_config."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by full name."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's command line."""


def write(
    network: Network,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    max_shard_size: int = 5_000_000_000,
    extras: Extras = Extras(),
) -> dict[str, str]:
    """Write a network into a folder and return the checksums of its weight files, {path in the folder: "sha256:..."}.

    `tensors` are (full name, tensor) pairs in any order, by default those of the module; names become those on disk, floats take
    the dtype that the original checkpoint has for them. Files beside the weights are copied from where the network came from; the
    other models of a pipeline too. The quantization_config is read off the module, and has the `extras` beside; arguments for
    an engine that takes them are in a file of their own.
    """
    parts = _parts(network)
    if network.origin is None:
        _write_companions(network, folder, parts)
    else:
        copy_companions(network.origin, folder, parts)
    engine_arguments.write(folder, extras.arguments, network.config)
    stem = "diffusion_pytorch_model" if network.family.modality in ("image", "video") else "model"
    checksums: dict[str, str] = {}
    for part, module in parts.items():
        told, guards = _empty_weight(network, module, stem)
        _write_config(network, module, folder / part, {**extras.entries, **told})
        given = resident(module) if tensors is None or len(parts) > 1 else tensors
        stream = chain(_as_on_disk(network, module, chain(given, extras.tensors.items())), guards.items())
        checksums |= {str(Path(part, file)): sum_ for file, sum_ in write_shards(folder / part, stream, stem, max_shard_size).items()}
    return checksums


def resident(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module by full name, tied ones once under their first name."""
    seen: set[int] = set()
    for slot in slots(module):
        if id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            yield slot.name, slot.tensor


def fingerprint_of(network: Network) -> str:
    """Return what identifies the resident weights, the same whether experts are fused or apart."""
    return fingerprint(as_on_disk(network.module, resident(network.module), always=True))


def _as_on_disk(network: Network, module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for given, tensor in as_on_disk(module, tensors):
        if tensor.is_meta:
            raise AerogelError(f"{given}: its values are not in memory; give save the stream of tensors")
        name = _name_on_disk(network, given)
        yield name, tensor.to(_stored_dtype(network, given, name, tensor))
    if network.unbuilt is not None:
        yield from network.unbuilt.tensors()


def _empty_weight(network: Network, module: nn.Module, stem: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the entry of quantization_config that names an empty weight, and the tensor; nothing where no reader would need it."""
    # diffusers refuses a method that it does not know.
    if stem != "model" or (weight := empty_weight.missing_weight(module)) is None:
        return {}, {}
    name = _name_on_disk(network, weight)
    return {empty_weight.KEY: name}, {name: empty_weight.tensor()}


def _name_on_disk(network: Network, given: str) -> str:
    """Return what the original checkpoint calls a tensor or its module, else what checkpoints of the family do."""
    found = network.checkpoint.new_on_disk(given) if network.checkpoint is not None else None
    return found or (network.names.on_disk(given) if network.names is not None else given)


def _stored_dtype(network: Network, given: str, name: str, tensor: Tensor) -> torch.dtype:
    # Codes are integers or have a dtype of one byte; to round a scale after integer codes were made on it would move every weight.
    if not tensor.is_floating_point() or tensor.element_size() < 2 or name.endswith("_scale"):
        return tensor.dtype
    checkpoint = network.checkpoint
    for known in (given, name):
        if checkpoint is not None and known in checkpoint and checkpoint.dtype(known).is_floating_point:
            return checkpoint.dtype(known)
    return network.stored_dtype or tensor.dtype


def _parts(network: Network) -> dict[str, nn.Module]:
    """The modules by the sub-folders of a pipeline that hold them; "" is the folder itself."""
    components = getattr(network.processor, "components", {})
    modules = [part for part, _ in entries(network.module)]
    found = {name: component for name, component in components.items() if any(component is module for module in modules)}
    return found or {"": network.module}


def copy_companions(origin: Path, folder: Path, parts: Collection[str] = ("",)) -> None:
    """Copy everything but weights (of a pipeline: of these parts), what another run of this package left, and hidden files."""
    own, skipped = [origin / part for part in parts], (*_OURS, *_OF_QUANTIZERS)
    for path in sorted(origin.iterdir() if own == [origin] else origin.rglob("*")):
        relative = path.relative_to(origin)
        left_out = path.name in skipped or str(relative) in FILES or any(name.startswith(".") for name in relative.parts)
        if not path.is_file() or left_out:
            continue
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if not (weights and path.parent in own):
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # follows links: hub caches are made of them


def _write_companions(network: Network, folder: Path, parts: Mapping[str, nn.Module]) -> None:
    """Write the files of a network that is in memory only; of a pipeline, its other parts too."""
    module: Any = network.module
    if "" not in parts:
        network.processor.save_config(folder)
        sources = {folder / name: component for name, component in network.processor.components.items() if name not in parts}
    else:
        sources = {folder: network.processor}
        if network.config is not None and hasattr(network.config, "save_pretrained"):
            network.config.save_pretrained(folder)
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.save_pretrained(folder)
    for place, source in sources.items():
        if hasattr(source, "save_pretrained"):
            with _os_errors(place):
                source.save_pretrained(place)
    for part, each in parts.items():
        denoiser: Any = each
        if hasattr(denoiser, "save_config"):  # diffusers
            denoiser.save_config(folder / part)


@contextmanager
def _os_errors(place: Path) -> Iterator[None]:
    """Raise OSError for an error of the operating system that a library written in Rust, such as tokenizers, raises as Exception."""
    try:
        yield
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        if number is None or type(error) is not Exception:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error


def _write_config(network: Network, module: nn.Module, folder: Path, entries: Mapping[str, Any]) -> None:
    """Bring config.json up to date: what changed in memory, and how the weights are quantized."""
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    config |= _changes(network)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
    config |= _other_when_opened(module, folder, config)
    untied = _has_untied(module)
    for each in configs_in(config):
        each.pop("quantization_config", None)
        if untied and (each is config or "tie_word_embeddings" in each):
            each["tie_word_embeddings"] = False
    if (quantization := describe(module, entries)) is not None:
        if network.unbuilt is not None:
            quantization["ignore"] += network.unbuilt.ignored
        config["quantization_config"] = quantization
    if "_class_name" not in config and not config.get("architectures") and hasattr(network.module, "main_input_name"):
        config["architectures"] = [type(network.module).__name__]
    if network.stored_dtype is not None and "_class_name" not in config:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(network.stored_dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _has_untied(module: nn.Module) -> bool:
    """Return True where a layer that shared its weight with the embeddings has another now, such as a quantized head."""
    tied = getattr(module, "_tied_weights_keys", None) or ()
    layers = {name.rpartition(".")[0] for name in tied}
    return any(isinstance(part, Replacement) for name, part in module.named_modules() if name in layers)


def _changes(network: Network) -> dict[str, Any]:
    """The settings that no longer are what they were in the folder; the others keep the spelling they have there."""
    config = network.config
    if network.origin is None or not hasattr(type(config), "from_pretrained"):
        return {}
    before = type(config).from_pretrained(network.origin).to_dict()
    return {key: value for key, value in config.to_dict().items() if key not in _PASSING and before.get(key) != value}


def _other_when_opened(module: nn.Module, folder: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that a configuration read from this folder has otherwise: derived from others, or of a diffusers model."""
    config: Any = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return _numbers_apart(config, written)
    if not hasattr(type(config), "from_pretrained"):
        return {}
    return _numbers_apart(config.to_dict(), type(config).from_pretrained(folder).to_dict())


def _numbers_apart(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with another whole number, those of nested settings as a whole."""
    return {key: value for key, value in now.items() if key in then and key not in _PASSING and _has_other_number(value, then[key])}


def _has_other_number(now: Any, then: Any) -> bool:
    if isinstance(now, dict) and isinstance(then, dict):
        return bool(_numbers_apart(now, then))
    return type(now) is int and now != then


def _beside(output: Path, what: str) -> Path:
    """A name beside the output that no other process takes."""
    return output.with_name(f".{output.name}.{uuid4().hex[:12]}.{what}")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
