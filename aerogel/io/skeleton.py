"""Skeletons: modules built from a configuration on the meta device, of whatever class the folder asks for, with no weight read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto

from aerogel.errors import AerogelError
from aerogel.io import own_tensors
from aerogel.io.checkpoint import Checkpoint, Dequantize, is_float8, together
from aerogel.io.dequantize import told
from aerogel.io.kv_scales import leave_unread
from aerogel.io.layouts import pieces
from aerogel.io.names import Names
from aerogel.io.packed_words import padded
from aerogel.io.quantized import attach, quantization_of
from aerogel.io.unbuilt import Unbuilt
from aerogel.layers.slots import Slot, replace, slots
from aerogel.layers.transposed import as_linears
from aerogel.model.experts import unfuse
from aerogel.model.family import Family, Modality

Made = TypeVar("Made")

_LARGE = 1 << 24
"""Elements from which an empty tensor is made on meta; tables of positions, which code fills with values, are smaller."""
_AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


@dataclass(frozen=True)
class Folder:
    """Description of a folder with one network, before anything of it is built."""

    path: Path
    settings: dict[str, Any]
    family: Family
    stored: torch.dtype
    dtype: torch.dtype
    """The dtype to compute in."""
    dequantize: Dequantize | None = None
    """Function that makes floats of its quantized tensors; None where they are opened as they are."""


@dataclass(frozen=True)
class Skeleton:
    """A module on meta, with its computed buffers real, its experts apart and quantized layers in place."""

    module: nn.Module
    names: Names
    checkpoint: Checkpoint
    """The folder's tensors by their names in memory."""
    fits: bool
    """True where the checkpoint has the module's tensors, so that each can be read when it is needed."""

    @property
    def unbuilt(self) -> Unbuilt | None:
        """Tensors of the checkpoint that are not the module's."""
        return Unbuilt.of(self.checkpoint, {slot.name for slot in slots(self.module)}) if self.fits else None

    @property
    def dequantized(self) -> str | None:
        """A line on how the weights were quantized on disk where they are opened as floats."""
        return told(self.checkpoint)


def skeleton_of(folder: Folder, build: Callable[[], nn.Module]) -> Skeleton:
    """Build the module of a folder on meta and bind the folder's checkpoint to it; raises AerogelError when they do not go together."""
    with accelerate.init_empty_weights(include_buffers=False), _LargeOnMeta():
        trouble = f"{folder.path / 'config.json'}: no model can be made from this configuration"
        module = made_from(build, trouble, "fetch the files of one model again")
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()
    kept = _kept_in_float32(module, folder.dtype)

    def declare(slot: Slot) -> torch.Tensor:
        tensor = slot.tensor.detach().to("meta")
        if any(f".{part}." in f".{slot.name}." for part in kept):
            return tensor.float()
        return tensor.to(folder.dtype) if "_class_name" in folder.settings and tensor.is_floating_point() else tensor

    replace(module, declare)
    names = Names.of(module)
    unfuse(module, names.experts)
    as_linears(module)
    quantization = quantization_of(folder.settings)
    if quantization and folder.dequantize is None:
        attach(module, quantization)
    apart = partial(pieces, module, padded(quantization))
    dequantize = folder.dequantize or together(own_tensors.reader(folder.settings, folder.path), leave_unread(quantization))
    checkpoint = Checkpoint.open(folder.path, names.in_memory, apart, dequantize)
    _leave_out_zero_biases(module, checkpoint)
    _require_untied(module, checkpoint)
    fits = _fits(module, folder, checkpoint)
    if fits:
        checkpoint.check(module)
    return Skeleton(module, names, checkpoint, fits)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on meta at once: the fused experts of one layer can be larger than the memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty and math.prod(_shape_asked(args)) >= _LARGE:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def _shape_asked(args: tuple[Any, ...]) -> tuple[int, ...]:
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    return tuple(size for size in sizes if isinstance(size, int))


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Return the configuration of a transformers folder; raises AerogelError for a type that this transformers does not know."""

    def read() -> Any:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)

    library = f"transformers {transformers.__version__}"
    advice = "upgrade transformers, or give --trust-remote-code where the folder has code of its own that you trust"
    config = made_from(read, f"{folder / 'config.json'}: {library} has no such model", advice)
    config.__dict__.pop("quantization_config", None)
    return config


def made_from(make: Callable[[], Made], trouble: str, advice: str) -> Made:
    """Return what a library makes of a configuration; raises AerogelError for whatever fails in it."""
    try:
        return make()
    except AerogelError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(f"{trouble} ({kind}{reason}); {advice}") from error


def model_class(config: Any, settings: dict[str, Any], trust_remote_code: bool) -> Any:
    """Return the class that opens a configuration: the one it names, else the first auto class that knows it."""
    own, named = settings.get("auto_map", {}) if trust_remote_code else {}, settings.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise AerogelError(f"architectures in config.json is {named!r}, expected a list of names of classes; fetch config.json again")
    for name in [] if own else named:
        if isinstance(found := getattr(transformers, name, None), type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for name in _AUTO:
        auto = getattr(transformers, name)
        if name in own or type(config) in auto._model_mapping:
            return auto
    raise AerogelError(f"no class of transformers {transformers.__version__} opens the model type {config.model_type!r}; upgrade it")


def build(cls: Any, config: Any, **options: Any) -> nn.Module:
    """Return a module of a class, or an auto class, of transformers; within a context that decides where its weights are."""
    made: nn.Module = (cls.from_config if hasattr(cls, "from_config") else cls._from_config)(config, **options)
    return made


def names_of(folder: Path, settings: dict[str, Any]) -> Names:
    """Return the conversions of names of a folder's tensors."""
    if "_class_name" in settings:
        return Names()
    config = read_config(folder, trust_remote_code=False)
    with accelerate.init_empty_weights(), _LargeOnMeta():
        return Names.of(build(model_class(config, settings, trust_remote_code=False), config))


def modality_of(model_type: str | None, class_name: str | None, settings: dict[str, Any]) -> Modality:
    """Return what a model of an unlisted type reads or makes, as far as its names and settings say."""
    if class_name is not None:
        return "video" if "3D" in class_name or "Video" in class_name else "image"
    pictures = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type != "git"
    return "image-text" if pictures or "vision_config" in settings else "text"


def whole(folder: Folder, cls: Any, names: Names, **options: Any) -> nn.Module:
    """Return the module as its own library reads it, which knows about names and layouts of other times."""
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    trouble = f"{folder.path}: no model can be made from these files"
    module, found = made_from(partial(cls.from_pretrained, folder.path, **options), trouble, "fetch the files of one model again")
    if lacking := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise AerogelError(
            f"{folder.path}: no weights for {lacking[0]} and {len(lacking) - 1} more; it is no checkpoint of a {type(module).__name__}"
        )
    unfuse(module, names.experts)
    as_linears(module)
    opened: nn.Module = module
    return opened


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names whose weights transformers or diffusers keeps in float32 whatever is computed in."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or not isinstance(module, transformers.PreTrainedModel):
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return kept if dtype in (torch.float16, torch.bfloat16) else set()


def _leave_out_zero_biases(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Leave out biases of quantized layers that have none in the model: AutoGPTQ wrote zeros for every layer."""
    known = {slot.name for slot in slots(module)}
    for name in checkpoint.names():
        home, _, kind = name.rpartition(".")
        if kind == "bias" and name not in known and checkpoint.is_dequantized(f"{home}.weight") and not checkpoint.tensor(name).any():
            checkpoint.leave_out(name)


def _require_untied(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise AerogelError where the config ties two weights of which the checkpoint has one in a quantized form of its own."""
    names: dict[int, list[str]] = {}
    for slot in slots(module):
        names.setdefault(id(slot.tensor), []).append(slot.name)
    for aliases in names.values():
        stored = [name for name in aliases if name in checkpoint]
        apart = [name for name in stored if checkpoint.is_dequantized(name)]
        if len(stored) > 1 and apart:
            raise AerogelError(
                f"{checkpoint.folder}: config.json ties {aliases[0]} and {aliases[1]}, and {apart[0]} is quantized apart; set "
                "tie_word_embeddings to false in config.json"
            )


def _fits(module: nn.Module, folder: Folder, checkpoint: Checkpoint) -> bool:
    """Compare names; raises AerogelError when they differ and nobody else can read the tensors, because they are quantized."""
    names: dict[int, set[str]] = {}
    for slot in slots(module):
        names.setdefault(id(slot.tensor), set()).add(slot.name)
    known = set().union(*names.values())
    obsolete = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    lacking = [aliases for aliases in names.values() if not any(name in checkpoint for name in aliases)]
    unknown = [name for name in checkpoint.names() if name not in known and not any(re.search(key, name) for key in obsolete)]
    float8 = [name for name in checkpoint.names() if is_float8(checkpoint.dtype(name))]
    quantized = bool(quantization_of(folder.settings))
    if (lacking or unknown) and (float8 or quantized):
        if not quantized:
            checkpoint.check(module)
        other = f"lacks {min(lacking[0])}" if lacking else f"has {unknown[0]}, which is unknown"
        raise AerogelError(
            f"{folder.path}: its quantized checkpoint is not one of a {type(module).__name__}: it {other}; compress the original again, "
            "or get the model in 16 bits"
        )
    return not lacking and not unknown
