"""`quantization_config` in a config.json: written from the layers of a model, read, and the layers put in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from aerogel.errors import AerogelError
from aerogel.io import quantization_schema
from aerogel.io.packed_words import FIRST, require_unpadded
from aerogel.layers.layout import format_of
from aerogel.layers.linear import set_timestep_index, timestep_index_of
from aerogel.layers.narrowed import KEY, narrow_as_told, widths_of
from aerogel.layers.replacement import Assigned, Replacement, class_of, kind_of
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model.match import found_at_start
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerStep, PerTensor, PerToken, Scheme, TensorScheme

OWN = ("compressed-tensors", "aerogel")
"""The quant_method of folders whose layers are opened as they are."""
_PLAIN = "linear"
"""The kind of the layers that compressed-tensors can express."""
_NEEDED = {"group": "group_size", "tensor_group": "group_size", "block": "block_structure", "step": "steps"}
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
# The library that reads plain folders also counts these classes as linear layers, though they keep their weight themselves.
_ROUTERS = ("Router", "Gate", "Gating")


def describe(module: nn.Module, entries: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the quantization_config of a module (a network or a block), or None when no layer in it was replaced and nothing else is said.

    `ignore` names every linear layer that is not quantized. Several schemes become several groups that name their layers one by one.
    Widths of layers that the configuration of the model does not hold are in `narrowed`.
    Layers that compressed-tensors cannot express are listed in `replacements`, and the method name is "aerogel" then, which
    readers that look it up refuse; transformers, which does not, refuses the empty weight (io/empty_weight.py). Raises AerogelError when
    a layer does not fit its scheme.
    """
    replaced = {name: part for name, part in module.named_modules() if isinstance(part, Replacement)}
    narrowed = widths_of(module)
    if not replaced and not entries and not narrowed:
        return None
    told = {name: options for name, part in replaced.items() if (options := part.describe()) is not None}
    groups: dict[tuple[TensorScheme, TensorScheme | None, bool], list[str]] = {}
    for name, part in replaced.items():
        if (assigned := part.assigned) is not None:
            if reason := part.refuse():
                raise AerogelError(f"{name} in {assigned.scheme}: {reason}")
            groups.setdefault((assigned.scheme.weights, assigned.scheme.inputs, assigned.act_order), []).append(name)
    by_name = len(groups) > 1 or any(replaced[name].in_groups for name in told)
    config_groups = {}
    for number, ((weights, inputs, act_order), names) in enumerate(groups.items()):
        config_groups[f"group_{number}"] = {
            "targets": names if by_name else ["Linear"],
            "weights": _write(weights) | ({"actorder": "group"} if act_order else {}),
            "input_activations": None if inputs is None else _write(inputs),
            "output_activations": None,
            "format": format_of(Scheme("", weights, inputs)),
        }
    formats = {group["format"] for group in config_groups.values()} or {"dense"}
    config = {
        "quant_method": "aerogel" if told or narrowed else "compressed-tensors",
        "version": FIRST,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": [name for name, part in module.named_modules() if _left_in_float(part)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if (index := timestep_index_of(module)) is not None:
        config["timestep_index"] = {"steps": list(index.steps), "sampler": index.sampler, "once_per_step": list(index.once_per_step)}
    if narrowed:
        config[KEY] = narrowed
    if told:
        config["replacements"] = {name: {"kind": kind_of(replaced[name]), **options} for name, options in told.items()}
    return config | dict(entries or {})


def configs_in(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a config.json and, where it has one, the config of the language model in it."""
    inner = settings.get("text_config")
    return [settings, inner] if isinstance(inner, dict) else [settings]


def quantization_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization_config of a config.json, which may be in that of the language model; empty where there is none.

    Raises AerogelError where it is no JSON object.
    """
    for part in configs_in(settings):
        if found := part.get("quantization_config"):
            if not isinstance(found, dict):
                raise AerogelError(f"quantization_config in config.json is {found!r}, expected a JSON object; fetch config.json again")
            if found.get("quant_method") in OWN:
                quantization_schema.check(found)
            return found
    return {}


def attach(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Put empty replacement layers where a quantization_config says, ready for the checkpoint's tensors.

    Raises AerogelError on a config that is not compressed-tensors or that says something this package cannot run.
    """
    narrow_as_told(module, config.get(KEY, {}))
    told = replacements(config)
    classes = {name: class_of(options["kind"]) for name, options in told.items()}
    for name, cls in classes.items():
        # An earlier step of the same run may have put the layer in place.
        if not cls.in_groups and not isinstance(module.get_submodule(name), cls):
            _rebuild(module, name, cls, told[name], None)
    named = [name for name, cls in classes.items() if cls.in_groups]
    for name, assigned in assignments(config, list(dict.fromkeys([*linears(module), *named]))).items():
        _rebuild(module, name, classes.get(name) or class_of(_PLAIN), told.get(name, {}), assigned)
    if (index := config.get("timestep_index", _clock(config))) is not None:
        set_timestep_index(module, TimestepIndex(index["steps"], index["sampler"]), index["once_per_step"])
    fuse_activations(module)


def attach_for_readers(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Do the same for a reader that fills the layers with the tensors as they are; raises AerogelError also where these are of before."""
    quantization_schema.check(dict(config))
    if quantization_schema.masked_tensors(config):
        raise AerogelError(
            "its weights are stored as bit masks, which aerogel.load reads; write the folder anew with "
            "`aerogel export FOLDER --format compressed_tensors`"
        )
    require_unpadded(config, {name: assigned.scheme for name, assigned in assignments(config, linears(module)).items()})
    attach(module, config)


def _rebuild(module: nn.Module, name: str, cls: type[Replacement], told: Mapping[str, Any], assigned: Assigned | None) -> None:
    try:
        module.set_submodule(name, cls.rebuild(module.get_submodule(name), told, assigned))
    except AerogelError as error:
        raise AerogelError(f"quantization_config: {name}: {error}") from error


def replacements(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the layers that compressed-tensors cannot express, by name, with their kinds and options; outer ones first."""
    if "replacements" in config:
        return {name: dict(told) for name, told in config["replacements"].items()}
    # Folders of earlier releases have one list for each kind.
    found: dict[str, dict[str, Any]] = {name: {"kind": "split", "widths": widths} for name, widths in config.get("splits", {}).items()}
    found |= {name: {"kind": "scaled_input"} for name in config.get("scaled_inputs", ())}
    return found | {name: {"kind": "conv"} for name in config.get("convolutions", ())}


def _clock(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the timestep index as earlier releases wrote it."""
    told = config.get("clock")
    return None if told is None else {"steps": told["steps"], "sampler": told["sampler"], "once_per_step": told["alone"]}


def fuse_activations(module: nn.Module) -> None:
    """Let kernels compute the activations behind quantized linear layers where they can; see fused.fuse."""
    if "diffusers.models.activations" in sys.modules:  # where it was never imported, nothing of it is in the module
        from aerogel.layers.fused_activations import fuse

        fuse(module)


def linears(module: nn.Module) -> list[str]:
    """Full dotted names of the float linear layers."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def assignments(config: Mapping[str, Any], names: list[str]) -> dict[str, Assigned]:
    """Return which of the linear layers called `names` are quantized, and how; raises AerogelError like `attach`."""
    if config.get("quant_method") not in OWN:
        raise AerogelError(
            f"quantization_config says quant_method={config.get('quant_method')!r}, which is not opened; give the original model "
            "in 16 bits, or one in compressed-tensors, gptq, awq, bitsandbytes, fp8 or mxfp4"
        )
    ignore = config.get("ignore") or []
    groups = [(_read_group(name, group), group["targets"]) for name, group in config["config_groups"].items()]
    targets = [(target, assigned) for assigned, named in groups for target in named]
    # A name is more particular than a pattern, a pattern than a class.
    targets.sort(key=lambda pair: 2 if pair[0] == "Linear" else 1 if pair[0].startswith("re:") else 0)
    exact = {target: assigned for target, assigned in reversed(targets) if not target.startswith("re:")}
    patterns = [(target, assigned) for target, assigned in targets if target.startswith("re:")]
    found = {}
    for name in names:
        if name in ignore or any(_means(pattern, name) for pattern in ignore):
            continue
        assigned = exact.get(name) or next((chosen for pattern, chosen in patterns if _means(pattern, name)), exact.get("Linear"))
        if assigned is not None:
            found[name] = assigned
    return found


def _means(pattern: str, name: str) -> bool:
    return pattern == "Linear" or (pattern.startswith("re:") and found_at_start(pattern, name))


def _left_in_float(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or (
        any(word in type(part).__name__ for word in _ROUTERS) and isinstance(getattr(part, "weight", None), nn.Parameter)
    )


def _write(tensor: TensorScheme) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": tensor.format.bits,
        "type": tensor.format.kind,
        "symmetric": tensor.symmetric,
        "dynamic": tensor.dynamic,
    }
    match tensor.granularity:
        case PerGroup(size):
            args |= {"strategy": "tensor_group" if tensor.scale_format == "e4m3" else "group", "group_size": size}
        case PerStep(count):
            args |= {"strategy": "step", "steps": count}
        case PerBlock(rows, columns):
            args |= {"strategy": "block", "block_structure": [rows, columns]}
        case granularity:
            args["strategy"] = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token"}[type(granularity)]
    if tensor.scale_format != "float":
        args["scale_dtype"] = _SCALE_DTYPES[tensor.scale_format]
    return args


def _read_group(name: str, group: Mapping[str, Any]) -> Assigned:
    if not isinstance(group, Mapping) or "targets" not in group or not group.get("weights") or group.get("output_activations"):
        raise AerogelError(
            f"quantization_config: {name} is not a group of linear layers with quantized weights and float outputs; it is not supported"
        )
    weights = _read(name, group["weights"])
    inputs = _read(name, group["input_activations"]) if group.get("input_activations") else None
    scheme = Scheme.of(weights, inputs)
    stored = group.get("format")
    if stored not in (None, "naive-quantized", format_of(scheme)):
        raise AerogelError(f"quantization_config: {name} is stored as {stored}; {scheme} is read from {format_of(scheme)} only")
    return Assigned(scheme, act_order=group["weights"].get("actorder") in ("group", "dynamic", True))


def _read(name: str, args: Mapping[str, Any]) -> TensorScheme:
    bits, kind = args.get("num_bits", 8), str(args.get("type", "int"))
    label = f"int{bits}" if kind == "int" else {8: "fp8_e4m3", 4: "fp4_e2m1"}.get(bits, f"fp{bits}")
    dynamic = args.get("dynamic", False)
    if label not in FORMATS or dynamic == "local":
        raise AerogelError(
            f"quantization_config: {name} uses {label} with dynamic={dynamic!r}, which cannot be run; known formats: {', '.join(FORMATS)}"
        )
    scale_format: Literal["float", "e8m0", "e4m3"] = "float"
    if label == "fp4_e2m1":
        scale_format = "e8m0" if args.get("group_size") == 32 else "e4m3"
    return TensorScheme(FORMATS[label], _granularity(name, args), bool(args.get("symmetric", True)), bool(dynamic), scale_format)


def _granularity(name: str, args: Mapping[str, Any]) -> Granularity:
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    needed = _NEEDED.get(strategy)
    if needed is not None and (args.get(needed) is None or args.get(needed) == -1):
        raise AerogelError(f"quantization_config: {name} has the strategy {strategy!r} and no {needed}; fetch config.json again")
    match strategy:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "token":
            return PerToken()
        case "step":
            return PerStep(int(args["steps"]))
        case "group" | "tensor_group":
            return PerGroup(int(size))  # type: ignore[arg-type]
        case "block":
            return PerBlock(*args["block_structure"])
        case other:
            raise AerogelError(f"quantization_config: {name} has the strategy {other!r}, which cannot be run")
