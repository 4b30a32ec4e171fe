"""Opening a network from wherever it is: a reference model, a folder, the hub, or an object in memory."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from torch import nn

from aerogel.errors import AerogelError, nearest
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.experts import pieces
from aerogel.io.processors import Pair
from aerogel.io.quantized import attach
from aerogel.io.reference import REFERENCES, folder_of
from aerogel.layers.slots import Slot, replace, slots
from aerogel.model.experts import unfuse
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.placement import HOST, Placement, move

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_UNWANTED = ("*.fp16.safetensors", "consolidated*", "original/*", "onnx/*", "openvino/*")
_DENOISERS = ("transformer", "transformer_2", "unet")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load(
    source: Any,
    families: Sequence[Family],
    *,
    device: torch.device = HOST,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    trust_remote_code: bool = False,
    unfuse_experts: bool = True,
) -> Network:
    """Open a network of one of these families without runtime policies; `aerogel.load` says what the other arguments are.

    A live module's fused experts become linear layers in place, unless `unfuse_experts` is false: who only runs it can leave it as it is.
    """
    if isinstance(source, Network):
        return source
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], nn.Module):
        return _live(families, source[0], source[1], dtype, unfuse_experts)
    if isinstance(source, nn.Module):
        return _live(families, source, None, dtype, unfuse_experts)
    if _is_pipeline(source):
        return _live(families, _denoiser(source), source, dtype, unfuse_experts)
    if isinstance(source, str | Path):
        return _open(families, _find(str(source), trust_remote_code), device, dtype, lazy, trust_remote_code)
    raise AerogelError(
        f"cannot open a {type(source).__name__}; give a name, a folder, a hub id, a module, a pipeline or (module, processor)"
    )


def family_of(families: Sequence[Family], *names: str | None) -> Family:
    """Return the family that one of these names belongs to: model types of configurations, class names of modules.

    Raises AerogelError that lists the known families.
    """
    for family in families:
        if set(names) & set(family.matches):
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.matches)})" for family in families)
    given = " or ".join(repr(name) for name in names if name)
    raise AerogelError(f"no known family has the model type {given}; known: {known}; a new one is one file in aerogel/families")


def computing_dtype(stored: torch.dtype, device: torch.device = HOST) -> torch.dtype:
    """The dtype to compute in for weights stored in `stored`: the same, or float32 on a CPU where that is emulated."""
    if device.type == HOST.type and stored in (torch.bfloat16, torch.float16):
        kind = "bf16" if stored == torch.bfloat16 else "fp16"
        # Without such instructions a bfloat16 product takes 5 and a float16 product 10 times as long as a float32 one.
        if not any(kind in name and value is True for name, value in torch.cpu.get_capabilities().items()):
            return torch.float32
    return stored


def part_of(folder: Path) -> Path:
    """The sub-folder of a pipeline that holds its denoiser, or any other folder itself; raises AerogelError for several denoisers."""
    if not (folder / "model_index.json").is_file():
        return folder
    index = _read_json(folder / "model_index.json")
    parts = [name for name in _DENOISERS if (index.get(name) or [None])[0] is not None]
    _require_one(parts, folder)
    return folder / parts[0]


def _live(families: Sequence[Family], module: nn.Module, processor: Any, dtype: torch.dtype | None, unfuse_experts: bool) -> Network:
    family = family_of(families, getattr(getattr(module, "config", None), "model_type", None), type(module).__name__)
    stored = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if absent := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise AerogelError(
            f"{absent[0]} and {len(absent) - 1} more are on the meta device; give the model's folder, or move it to memory first"
        )
    if dtype is not None:
        module.to(dtype)
    if unfuse_experts:
        unfuse(module, family)
    return Network(module.eval(), family, processor=processor, stored_dtype=stored)


def _is_pipeline(source: Any) -> bool:
    diffusers = sys.modules.get("diffusers")  # who holds a pipeline has imported it
    return diffusers is not None and isinstance(source, diffusers.DiffusionPipeline)


def _denoiser(pipeline: Any) -> nn.Module:
    found = [name for name in _DENOISERS if pipeline.components.get(name) is not None]
    _require_one(found, type(pipeline).__name__)
    module: nn.Module = pipeline.components[found[0]]
    return module


def _require_one(denoisers: list[str], owner: Any) -> None:
    if len(denoisers) != 1:
        found = f"{len(denoisers)} denoisers ({', '.join(denoisers)})" if denoisers else "no denoiser"
        raise AerogelError(f"{owner} has {found}, expected one; open one by itself: its sub-folder, or pipeline.transformer")


def _find(source: str, trust_remote_code: bool) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AerogelError(f"{source} is a file; give the folder that holds it and its config.json")
    if source in REFERENCES:
        return folder_of(source)
    if not _HUB_ID.fullmatch(source):
        raise AerogelError(f"{source!r} is no folder, no hub id (owner/name){nearest(source, REFERENCES)}")
    try:
        wanted = [*_WANTED, "*.py"] if trust_remote_code else list(_WANTED)
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(
            f"{source}: no such folder here, and the hub did not give it ({reason}); check the name and the connection"
        ) from error


def _open(
    families: Sequence[Family], folder: Path, device: torch.device, dtype: torch.dtype | None, lazy: bool, trust_remote_code: bool
) -> Network:
    if (folder / "model_index.json").is_file():
        return _open_pipeline(families, folder, device, dtype)
    given = _Folder.read(folder, families, device, dtype)
    placed = Placement.at(device)
    if "_class_name" in given.settings:
        return Network(_denoiser_in(given), given.family, folder, stored_dtype=given.stored, placed=placed)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    config.__dict__.pop("quantization_config", None)
    auto = transformers.AutoModelForImageTextToText if given.family.modality == "image-text" else transformers.AutoModelForCausalLM
    options = {"dtype": given.dtype, "trust_remote_code": trust_remote_code}
    module = _skeleton(given, lambda: auto.from_config(config, **options))
    fits = _fits(module, given)
    if fits:
        given.checkpoint.materialise(module, device=device, skip=list(Network(module, given.family).blocks().values()) if lazy else [])
    else:
        module = _whole(given, auto, config=config, **options)
    with suppress(OSError):  # a folder may do without
        module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    processor = _processor(folder, given.family, trust_remote_code)
    move(module, device)
    return Network(module.eval(), given.family, folder, processor, given.checkpoint if lazy and fits else None, given.stored, placed)


def _open_pipeline(families: Sequence[Family], folder: Path, device: torch.device, dtype: torch.dtype | None) -> Network:
    part = part_of(folder)
    given = _Folder.read(part, families, device, dtype)
    module = _denoiser_in(given)
    diffusers = _diffusers(folder)
    try:
        with _without_bars(diffusers.utils.logging), _without_bars(transformers.utils.logging):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, dtype=given.dtype, use_safetensors=True, local_files_only=True, **{part.name: module}
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AerogelError(f"{folder}: diffusers cannot open this pipeline ({reason}); add what it lacks, or open {part} alone") from error
    if device != HOST:
        pipeline.to(device)
    return Network(module, given.family, folder, pipeline, stored_dtype=given.stored, placed=Placement.at(device))


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Keep a library's progress bars out of ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class _Folder:
    """Description of a folder with one network, before anything of it is built."""

    path: Path
    settings: dict[str, Any]
    family: Family
    checkpoint: Checkpoint
    stored: torch.dtype
    device: torch.device
    dtype: torch.dtype
    """The dtype to compute in."""

    @classmethod
    def read(cls, path: Path, families: Sequence[Family], device: torch.device, dtype: torch.dtype | None) -> _Folder:
        settings = _read_json(path / "config.json")
        family = family_of(families, settings.get("model_type"), settings.get("_class_name"))
        checkpoint = Checkpoint.open(path, family.in_memory, partial(pieces, family))
        checkpoint.verify()
        stored = checkpoint.main_dtype()
        return cls(path, settings, family, checkpoint, stored, device, dtype or computing_dtype(stored, device))


def _denoiser_in(given: _Folder) -> nn.Module:
    """The denoiser of a diffusers folder, all of it: glue may call into a block, as DiT's does."""
    cls = getattr(_diffusers(given.path), given.settings["_class_name"])
    settings = {key: value for key, value in given.settings.items() if key != "quantization_config"}
    module = _skeleton(given, lambda: cls.from_config(settings))
    if not _fits(module, given):
        module = _whole(given, cls, dtype=given.dtype)
    else:
        given.checkpoint.materialise(module, device=given.device)
    move(module, given.device)
    return module.eval()


def _skeleton(given: _Folder, build: Callable[[], nn.Module]) -> nn.Module:
    """The module on meta, with its computed buffers real, its experts apart and quantized linear layers in place."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = build()
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()
    kept = _kept_in_float32(module, given.dtype)

    def declare(slot: Slot) -> torch.Tensor:
        tensor = slot.tensor.detach().to("meta")
        if any(f".{part}." in f".{slot.name}." for part in kept):
            return tensor.float()
        return tensor.to(given.dtype) if "_class_name" in given.settings and tensor.is_floating_point() else tensor

    replace(module, declare)
    unfuse(module, given.family)
    if quantization := given.settings.get("quantization_config"):
        attach(module, quantization)
    return module


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names whose weights transformers or diffusers keeps in float32 whatever is computed in."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or not isinstance(module, transformers.PreTrainedModel):
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return kept if dtype in (torch.float16, torch.bfloat16) else set()


def _fits(module: nn.Module, given: _Folder) -> bool:
    """Return True where the checkpoint has exactly the module's tensors, so that each can be read when it is needed.

    Raises AerogelError when it does not and cannot be read in another way, because its tensors are quantized.
    """
    names: dict[int, set[str]] = {}
    for slot in slots(module):
        names.setdefault(id(slot.tensor), set()).add(slot.name)
    known = set().union(*names.values())
    obsolete = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    lacking = [aliases for aliases in names.values() if not any(name in given.checkpoint for name in aliases)]
    unknown = [name for name in given.checkpoint.names() if name not in known and not any(re.search(key, name) for key in obsolete)]
    if (lacking or unknown) and given.settings.get("quantization_config"):
        other = f"lacks {min(lacking[0])}" if lacking else f"has {unknown[0]}, which is unknown"
        raise AerogelError(
            f"{given.path}: its quantized checkpoint is not one of a {type(module).__name__}: it {other}; compress the original again"
        )
    return not lacking and not unknown


def _whole(given: _Folder, cls: Any, **options: Any) -> nn.Module:
    """The module as its own library reads it, which knows about names and layouts of other times."""
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    module, found = cls.from_pretrained(given.path, **options)
    if lacking := sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"]):
        raise AerogelError(
            f"{given.path}: no weights for {lacking[0]} and {len(lacking) - 1} more; it is no checkpoint of a {type(module).__name__}"
        )
    unfuse(module, given.family)
    whole: nn.Module = module
    return whole


def _processor(folder: Path, family: Family, trust_remote_code: bool) -> Any:
    """The tokenizer or processor of the folder, or None when it has none."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if family.modality == "image-text":
        # Without torchvision some processors cannot be built; their parts can.
        with suppress(ImportError):
            found = transformers.AutoProcessor.from_pretrained(folder, **options)
            return found if hasattr(found, "image_processor") else _pair(folder, found, options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return _pair(folder, tokenizer, options) if family.modality == "image-text" else tokenizer


def _pair(folder: Path, tokenizer: Any, options: dict[str, Any]) -> Any:
    """The tokenizer with the folder's image processor, where it has one and says which token stands for an image."""
    number = _read_json(folder / "config.json").get("image_token_id")
    if number is None or not (folder / "preprocessor_config.json").is_file():
        return tokenizer
    images = transformers.AutoImageProcessor.from_pretrained(folder, **options)
    return Pair(tokenizer, images, tokenizer.convert_ids_to_tokens(number))


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
