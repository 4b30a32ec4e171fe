"""Opening a network from wherever it is: a reference model, a folder, the hub, or an object in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from aerogel.errors import AerogelError
from aerogel.io import own_tensors, pipelines
from aerogel.io.adapters import Adapter, adapter_in, merging, require_no_adapters
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.dequantize import dequantizer_of
from aerogel.io.json_files import read_object
from aerogel.io.names import Names
from aerogel.io.processors import Pair
from aerogel.io.skeleton import Folder, Skeleton, build, made_from, modality_of, model_class, read_config, skeleton_of, whole
from aerogel.io.source import ModelSource, locate
from aerogel.layers.transposed import as_linears
from aerogel.model.denoisers import Denoisers, family_of_all
from aerogel.model.experts import unfuse
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.model.placement import HOST, Placement, move
from aerogel.numerics.ranges import require_range

_DENOISERS = ("transformer", "transformer_2", "unet")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_READ = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Ends of the names of the files that models are opened from."""
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
    revision: str | None = None,
    dequantize: bool = False,
    merge_adapter: bool = False,
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
        return _live(families, _denoisers(source), source, dtype, unfuse_experts)
    if isinstance(source, str | Path):
        source = locate(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, merge_adapter=merge_adapter)
    if isinstance(source, ModelSource):
        _require_regular_files(source.folder)
        adapter = None if source.adapter is None else adapter_in(source.adapter)
        given = partial(_read_folder, families=families, device=device, dtype=source.dtype, dequantize=dequantize, adapter=adapter)
        network = _open(source.folder, given, device, lazy, source.trust_remote_code)
        network.source = source
        return network
    raise AerogelError(
        f"cannot open a {type(source).__name__}; give a name, a folder, a hub id, a module, a pipeline or (module, processor)"
    )


def family_of(families: Sequence[Family], model_type: str | None, class_name: str | None, settings: dict[str, Any] | None = None) -> Family:
    """Return the family file's data for a model type or a class of diffusers, or what can be said of an architecture without one."""
    for family in families:
        if {model_type, class_name} & set(family.matches):
            return family if class_name else replace(family, modality=modality_of(model_type, None, settings or {}))
    name = class_name or model_type or "model"
    return Family(name, (name,), modality=modality_of(model_type, class_name, settings or {}))


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
    first, *others = _parts_of(folder)
    if others:
        names = ", ".join(part.name for part in (first, *others))
        raise AerogelError(f"{folder} has {len(others) + 1} denoisers ({names}), expected one; give the sub-folder of one")
    return first


def _parts_of(folder: Path) -> list[Path]:
    """The sub-folders of a pipeline that hold denoisers."""
    index, path = _read_json(folder / "model_index.json"), folder / "model_index.json"
    for name in _DENOISERS:
        if not isinstance(entry := index.get(name) or [None], list):
            raise AerogelError(f"{path}: {name} is {entry!r}, expected a library and a class; fetch it again")
    parts = [folder / name for name in _DENOISERS if (index.get(name) or [None])[0] is not None]
    if not parts:
        raise AerogelError(f"{folder} has no denoiser ({', '.join(_DENOISERS)}); give the folder of a model of it")
    return parts


def _live(families: Sequence[Family], module: nn.Module, processor: Any, dtype: torch.dtype | None, unfuse_experts: bool) -> Network:
    _require_unwrapped(module)
    require_no_adapters(module)
    stored = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if absent := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise AerogelError(
            f"{absent[0]} and {len(absent) - 1} more are on the meta device; give the model's folder, or move it to memory first"
        )
    if dtype is not None:
        for name, parameter in module.named_parameters():
            require_range(name, parameter, dtype)
        module.to(dtype)
    family = family_of_module(families, module)
    names = Names.of(module)
    if unfuse_experts:
        unfuse(module, names.experts)
    as_linears(module)
    return _discovered(Network(module.eval(), family, processor=processor, stored_dtype=stored, names=names))


def _require_unwrapped(module: nn.Module) -> None:
    """Raise AerogelError for a module in the wrapper of torch.compile or PEFT, whose structure and names are not the model's."""
    for part in (module, *(module.children() if isinstance(module, Denoisers) else ())):
        if hasattr(part, "_orig_mod"):
            raise AerogelError(
                f"{type(part._orig_mod).__name__} is wrapped by torch.compile, whose layers cannot be changed: give the model itself "
                "(its _orig_mod), and compile afterwards, block by block where a feature cache is to act (block.compile())"
            )
        if hasattr(part, "peft_config") and hasattr(part, "get_base_model"):
            raise AerogelError(
                f"{type(part.get_base_model()).__name__} is wrapped by PEFT, whose adapters are no part of its weights: give "
                "merge_and_unload() of it, or get_base_model() without them"
            )


def family_of_module(families: Sequence[Family], module: nn.Module) -> Family:
    """Return the same for a module; one of neither transformers nor diffusers reads text, for all that is known."""
    if isinstance(module, Denoisers):
        parts = dict(module.named_children())
        return family_of_all(family_of_module(families, next(iter(parts.values()))), parts)
    if isinstance(module, transformers.PreTrainedModel):
        return family_of(families, module.config.model_type, None, module.config.to_dict())
    denoises = hasattr(module, "save_config")  # a model of diffusers
    known = family_of(families, None, type(module).__name__)
    return known if denoises or known in families else replace(known, modality="text")


def _is_pipeline(source: Any) -> bool:
    diffusers = sys.modules.get("diffusers")  # who holds a pipeline has imported it
    return diffusers is not None and isinstance(source, diffusers.DiffusionPipeline)


def _denoisers(pipeline: Any) -> nn.Module:
    """The denoiser of a pipeline, or all of several."""
    found = {name: pipeline.components[name] for name in _DENOISERS if pipeline.components.get(name) is not None}
    if not found:
        raise AerogelError(f"{type(pipeline).__name__} has no denoiser ({', '.join(_DENOISERS)}); give a model of it")
    return _together(found)


def _together(denoisers: dict[str, nn.Module]) -> nn.Module:
    return Denoisers(denoisers) if len(denoisers) > 1 else next(iter(denoisers.values()))


def _require_regular_files(folder: Path) -> None:
    """Raise AerogelError for a file of a model or a pipeline that is a pipe, a broken link or the like: libraries go on without it."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.suffix in _READ and not path.is_file():
            raise AerogelError(f"{path} is no regular file; fetch or copy the file again")


def _open(folder: Path, read_folder: Callable[[Path], Folder], device: torch.device, lazy: bool, trust_remote_code: bool) -> Network:
    if (folder / "model_index.json").is_file():
        return _open_pipeline(folder, read_folder, device)
    _require_trust(folder, trust_remote_code)
    given = read_folder(folder)
    placed = Placement.at(device)
    if "_class_name" in given.settings:
        module, made = _denoiser_in(given, device)
        network = Network(
            module, given.family, folder, stored_dtype=given.stored, names=made.names, placed=placed, dequantized=made.dequantized
        )
        return _discovered(network)
    config = read_config(folder, trust_remote_code)
    cls = model_class(config, given.settings, trust_remote_code)
    options = {"dtype": given.dtype} | ({"trust_remote_code": trust_remote_code} if hasattr(cls, "from_config") else {})
    made = skeleton_of(given, lambda: build(cls, config, **options))
    module = made.module
    network = Network(
        module,
        given.family,
        folder,
        stored_dtype=given.stored,
        names=made.names,
        placed=placed,
        unbuilt=made.unbuilt,
        dequantized=made.dequantized,
    )
    if made.fits:
        made.checkpoint.materialise(module, device=device, skip=list(network.blocks().values()) if lazy else [])
    else:
        network.module = module = whole(given, cls, made.names, config=config, **options)
    if (settings := folder / "generation_config.json").is_file():
        module.generation_config = _generation_settings(settings)
    move(module, device)
    module.eval()
    read = partial(_processor, folder, given.family, trust_remote_code)
    network.processor = made_from(read, f"{folder}: its tokenizer or processor cannot be read", "fetch its files again")
    network.checkpoint = made.checkpoint if lazy and made.fits else None
    return _discovered(network)


def _generation_settings(path: Path) -> transformers.GenerationConfig:
    """Read generation_config.json; raises AerogelError where that fails, and for special tokens that are no ids."""
    asked = partial(transformers.GenerationConfig.from_pretrained, path.parent, local_files_only=True)
    found = made_from(asked, f"{path} cannot be read", "fetch it again, or remove it")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        ids = getattr(found, name, None)
        if not all(type(one) is int for one in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
            raise AerogelError(f"{path}: {name} is {ids!r}, expected the id of a token or a list of ids; fetch it again, or remove it")
    return found


def _discovered(network: Network) -> Network:
    network.discover()
    return network


def _require_trust(folder: Path, trust_remote_code: bool) -> None:
    """Raise AerogelError where a model cannot be built without running its own Python files, and nobody has asked for that."""
    settings = _read_json(folder / "config.json")
    code = settings.get("auto_map")
    if isinstance(code, dict) and code and not trust_remote_code and settings.get("model_type") not in transformers.CONFIG_MAPPING:
        file = str(next(iter(code.values()))).partition(".")[0]
        raise AerogelError(f"{folder} has a model class of its own ({file}.py); read that file, and add --trust-remote-code to run it")


def _open_pipeline(folder: Path, read_folder: Callable[[Path], Folder], device: torch.device) -> Network:
    parts = _parts_of(folder)
    given = [read_folder(part) for part in parts]
    opened = [_denoiser_in(each, device) for each in given]
    modules = {part.name: module for part, (module, _) in zip(parts, opened, strict=True)}
    pipeline = pipelines.open_pipeline(folder, modules, given[0].dtype)
    if device != HOST:
        pipeline.to(device)
    module, placed = _together(modules), Placement.at(device)
    family = family_of_all(given[0].family, modules) if len(modules) > 1 else given[0].family
    made = [each for _, each in opened]
    network = Network(module, family, folder, pipeline, stored_dtype=given[0].stored, names=made[0].names, placed=placed)
    network.dequantized = next((each.dequantized for each in made if each.dequantized), None)
    return _discovered(network)


def _read_folder(
    path: Path, *, families: Sequence[Family], device: torch.device, dtype: torch.dtype | None, dequantize: bool, adapter: Adapter | None
) -> Folder:
    settings = _read_json(path / "config.json")
    family = family_of(families, settings.get("model_type"), settings.get("_class_name"), settings)
    floats = dequantizer_of(settings, path, compressed=dequantize or adapter is not None)
    if adapter is not None:
        floats = merging(adapter, floats or own_tensors.reader(settings, path))
    checkpoint = Checkpoint.open(path, dequantize=floats)
    checkpoint.verify()
    _require_layers(path, settings, len(checkpoint.names()))
    stored = checkpoint.main_dtype()
    return Folder(path, settings, family, stored, dtype or computing_dtype(stored, device), floats)


def _require_layers(path: Path, settings: dict[str, Any], tensors: int) -> None:
    """Raise AerogelError where a configuration asks for more layers than there are tensors, which would take as long to build."""
    for part in (settings, *(each for each in settings.values() if isinstance(each, dict))):
        for key, value in part.items():
            if key in _LAYERS and isinstance(value, int) and value > tensors:
                raise AerogelError(
                    f"{path / 'config.json'}: {key} is {value}, and the checkpoint has {tensors} tensors; fetch the files of one model"
                )


def _denoiser_in(given: Folder, device: torch.device) -> tuple[nn.Module, Skeleton]:
    """The denoiser of a diffusers folder, all of it: glue may call into a block, as DiT's does."""
    name = given.settings.get("_class_name")
    if name is None:
        raise AerogelError(f"{given.path / 'config.json'} names no class of diffusers (_class_name); fetch the file again")
    cls = getattr(pipelines.library(given.path), name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise AerogelError(f"{given.path / 'config.json'}: diffusers has no model {name}; upgrade diffusers")
    settings = {key: value for key, value in given.settings.items() if key != "quantization_config"}
    made = skeleton_of(given, lambda: cls.from_config(settings))
    if not made.fits:
        module = whole(given, cls, made.names, dtype=given.dtype)
    else:
        module = made.module
        made.checkpoint.materialise(module, device=device)
    move(module, device)
    return module.eval(), made


def _processor(folder: Path, family: Family, trust_remote_code: bool) -> Any:
    """The tokenizer or processor of the folder, or None when it has none; special tokens that have no ids show here, and not later."""
    found = _read_processor(folder, family, trust_remote_code)
    getattr(getattr(found, "tokenizer", found), "all_special_ids", ())
    return found


def _read_processor(folder: Path, family: Family, trust_remote_code: bool) -> Any:
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


def _read_json(path: Path) -> dict[str, Any]:
    """Read a configuration; raises AerogelError where what it names the model by is no name."""
    found = read_object(path, "give a Hugging Face folder (config.json) or a diffusers folder (model_index.json)")
    for key in ("model_type", "_class_name"):
        if not isinstance(found.get(key, ""), str):
            raise AerogelError(f"{path}: {key} is {found[key]!r}, expected a name; fetch the file again")
    return found
