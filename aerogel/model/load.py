"""Opening a network from wherever it is: a reference model, a folder, the hub, or an object in memory."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from torch import nn

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.checkpoint import Checkpoint
from aerogel.model.experts import unfuse
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.quantized import attach
from aerogel.model.reference import REFERENCES, folder_of
from aerogel.model.slots import release, slots

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_UNWANTED = ("*.fp16.safetensors", "consolidated*", "original/*", "onnx/*", "openvino/*")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load(source: Any, *, dtype: torch.dtype | None = None, lazy: bool = True, trust_remote_code: bool = False) -> Network:
    """Open a network.

    `source` is the name of a reference model, a Hugging Face or diffusers folder, a hub id, an `nn.Module`, a diffusers
    pipeline, or a pair (module, processor). With `lazy` the weights of blocks stay on disk where the checkpoint allows it;
    `network.checkpoint.materialise(network.module)` brings them in. `dtype` is what is computed in: by default the
    checkpoint's, or float32 on a CPU that has no instructions for it. Raises AerogelError when the source is not found,
    damaged, pickled or of an unknown family.
    """
    if isinstance(source, Network):
        return source
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], nn.Module):
        return _live(source[0], source[1], dtype)
    if isinstance(source, nn.Module):
        return _live(source, None, dtype)
    if _is_pipeline(source):
        return _live(_denoiser(source), source, dtype)
    if isinstance(source, str | Path):
        return _open(_find(str(source), trust_remote_code), dtype, lazy, trust_remote_code)
    raise AerogelError(
        f"cannot open a {type(source).__name__}; give a name, a folder, a hub id, a module, a pipeline or (module, processor)"
    )


def family_of(*names: str | None) -> Family:
    """The family that one of these names belongs to: model types of configurations, class names of modules.

    Raises AerogelError that lists the known families.
    """
    families = [catalog.find("families", name) for name in catalog.names("families")]
    for family in families:
        if set(names) & set(family.matches):
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.matches)})" for family in families)
    given = " or ".join(repr(name) for name in names if name)
    raise AerogelError(f"no known family has the model type {given}; known: {known}; a new one is one file in aerogel/families")


def computing_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in on this CPU for weights stored in `stored`: the same, or float32 where that is emulated."""
    if stored in (torch.bfloat16, torch.float16):
        kind = "bf16" if stored == torch.bfloat16 else "fp16"
        # Without such instructions a bfloat16 product takes 5 and a float16 product 10 times as long as a float32 one.
        if not any(kind in name and value is True for name, value in torch.cpu.get_capabilities().items()):
            return torch.float32
    return stored


def _live(module: nn.Module, processor: Any, dtype: torch.dtype | None) -> Network:
    family = family_of(getattr(getattr(module, "config", None), "model_type", None), type(module).__name__)
    stored = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype is not None:
        module.to(dtype)
    unfuse(module, family)
    return Network(module.eval(), family, processor=processor, stored_dtype=stored)


def _is_pipeline(source: Any) -> bool:
    diffusers = sys.modules.get("diffusers")  # who holds a pipeline has imported it
    return diffusers is not None and isinstance(source, diffusers.DiffusionPipeline)


def _denoiser(pipeline: Any) -> nn.Module:
    found = [pipeline.components[name] for name in ("transformer", "transformer_2", "unet") if pipeline.components.get(name) is not None]
    if len(found) != 1:
        raise AerogelError(
            f"{type(pipeline).__name__} has {len(found)} denoisers, expected one; give the module itself, for example pipeline.transformer"
        )
    module: nn.Module = found[0]
    return module


def _find(source: str, trust_remote_code: bool) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AerogelError(f"{source} is a file; give the folder that holds it and its config.json")
    if source in REFERENCES:
        return folder_of(source)
    if not _HUB_ID.fullmatch(source):
        raise AerogelError(f"{source!r} is no folder, no hub id (owner/name){catalog.nearest(source, REFERENCES)}")
    try:
        wanted = [*_WANTED, "*.py"] if trust_remote_code else list(_WANTED)
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(
            f"{source}: no such folder here, and the hub did not give it ({reason}); check the name and the connection"
        ) from error


def _open(folder: Path, dtype: torch.dtype | None, lazy: bool, trust_remote_code: bool) -> Network:
    if (folder / "model_index.json").is_file():
        return _open_pipeline(folder, dtype)
    settings = _read_json(folder / "config.json")
    family = family_of(settings.get("model_type"), settings.get("_class_name"))
    checkpoint = Checkpoint.open(folder, family.in_memory)
    checkpoint.verify()
    stored = checkpoint.main_dtype()
    dtype = dtype or computing_dtype(stored)
    if "_class_name" in settings:
        return Network(_diffusers_model(folder, settings["_class_name"], dtype), family, folder, stored_dtype=stored)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    module = _skeleton(config, family, dtype, trust_remote_code)
    fits = _fits(module, checkpoint, dtype)
    if fits:
        checkpoint.materialise(module, skip=list(Network(module, family).blocks().values()) if lazy else [])
    elif settings.get("quantization_config"):
        raise AerogelError(f"{folder}: its quantized tensors are not those of {type(module).__name__}; compress the original again")
    else:
        module = _read_whole(folder, config, family, dtype, trust_remote_code)
        unfuse(module, family)
    with suppress(OSError):  # a folder may do without
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    processor = _processor(folder, family, trust_remote_code)
    return Network(module.eval(), family, folder, processor, checkpoint if lazy and fits else None, stored)


def _skeleton(config: Any, family: Family, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The module on meta, with its computed buffers real, its experts apart and quantized linears in place."""
    quantization = config.__dict__.pop("quantization_config", None)
    with accelerate.init_empty_weights(include_buffers=False):
        module: nn.Module = _auto_class(family).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    module.tie_weights()  # type: ignore[operator]
    unfuse(module, family)
    if quantization is not None:
        attach(module, quantization)
    release(module)  # buffers that the checkpoint has
    return module


def _read_whole(folder: Path, config: Any, family: Family, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The module as transformers reads it, which knows about names and layouts of other times."""
    module, found = _auto_class(family).from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if lacking := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise AerogelError(
            f"{folder}: no weights for {lacking[0]} and {len(lacking) - 1} more; the checkpoint is not one of a {type(module).__name__}"
        )
    whole: nn.Module = module
    return whole


def _fits(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the checkpoint has exactly the module's tensors, so that each can be read when it is needed."""
    if dtype in (torch.float16, torch.bfloat16) and (
        getattr(module, "_keep_in_fp32_modules_strict", None) or getattr(module, "_keep_in_fp32_modules", None)
    ):
        return False  # transformers knows which parts to leave in float32
    names: dict[int, set[str]] = {}
    for slot in slots(module):
        names.setdefault(id(slot.tensor), set()).add(slot.name)
    known = set().union(*names.values())
    obsolete = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    complete = all(any(name in checkpoint for name in aliases) for aliases in names.values())
    return complete and all(name in known or any(re.search(key, name) for key in obsolete) for name in checkpoint.names())


def _auto_class(family: Family) -> Any:
    return transformers.AutoModelForImageTextToText if family.modality == "image-text" else transformers.AutoModelForCausalLM


def _processor(folder: Path, family: Family, trust_remote_code: bool) -> Any:
    """The tokenizer or processor of the folder, or None when it has none."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if family.modality == "image-text":
        # Without torchvision some processors cannot be built; their tokenizer can.
        with suppress(ImportError):
            return transformers.AutoProcessor.from_pretrained(folder, **options)
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


def _open_pipeline(folder: Path, dtype: torch.dtype | None) -> Network:
    diffusers = _diffusers(folder)
    index = _read_json(folder / "model_index.json")
    part = next((name for name in ("transformer", "unet") if index.get(name)), "transformer")
    checkpoint = Checkpoint.open(folder / part)
    checkpoint.verify()
    stored = checkpoint.main_dtype()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=dtype or computing_dtype(stored), use_safetensors=True, local_files_only=True
    )
    module = _denoiser(pipeline)
    return Network(module.eval(), family_of(type(module).__name__), folder, pipeline, stored_dtype=stored)


def _diffusers_model(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    cls = getattr(_diffusers(folder), name)
    module: nn.Module = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return module.eval()


def _diffusers(folder: Path) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise AerogelError(f"{folder} holds a diffusers model: pip install 'aerogel[diffusion]'") from error
    return diffusers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AerogelError(
            f"{path} is missing; give a Hugging Face folder (config.json) or a diffusers folder (model_index.json)"
        ) from error
    except ValueError as error:
        raise AerogelError(f"{path} is not JSON ({error}); fetch or copy the file again") from error
    return settings
