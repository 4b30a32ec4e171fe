"""What `quantization_config` in a config.json says, and the quantized linears it means: written, read, put in place."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer, QuantConv2d, empty
from aerogel.layers.layout import format_of, refuse
from aerogel.layers.linear import QuantLinear, ScaledInput
from aerogel.layers.split import split, splits
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerStep, PerTensor, PerToken, Scheme, TensorScheme

_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
# The library that reads plain folders also counts these classes as linears, though they keep their weight themselves.
_ROUTERS = ("Router", "Gate", "Gating")


class Assigned(NamedTuple):
    """How one linear is stored."""

    scheme: Scheme
    act_order: bool = False


def describe(module: nn.Module) -> dict[str, Any] | None:
    """Return the quantization_config of a module (a network or a block), or None when no linear in it is quantized.

    `ignore` names every linear left in float. Several schemes become several groups that name their linears one by one. A module
    with scaled inputs, convolutions, split layers (all listed) or one scale a step, which compressed-tensors cannot express, gets the
    method name "aerogel": other readers then refuse it instead of reading it wrongly. Raises AerogelError when a layer does not fit
    its scheme.
    """
    quantized = {name: part for name, part in module.named_modules() if isinstance(part, QuantLinear)}
    scaled = [name for name, part in module.named_modules() if isinstance(part, ScaledInput)]
    split_at = splits(module)
    if not quantized and not scaled and not split_at:
        return None
    beyond = [name for name, part in quantized.items() if _beyond_compressed_tensors(part)]
    groups: dict[tuple[TensorScheme, TensorScheme | None, bool], list[str]] = {}
    for name, linear in quantized.items():
        if reason := refuse(linear.scheme, linear.in_features, linear.out_features):
            raise AerogelError(f"{name} in {linear.scheme}: {reason}")
        groups.setdefault((linear.scheme.weights, linear.scheme.inputs, linear.g_idx is not None), []).append(name)
    config_groups = {}
    for number, ((weights, inputs, act_order), names) in enumerate(groups.items()):
        config_groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 and not beyond else names,
            "weights": _write(weights) | ({"actorder": "group"} if act_order else {}),
            "input_activations": None if inputs is None else _write(inputs),
            "output_activations": None,
            "format": format_of(Scheme("", weights, inputs)),
        }
    formats = {group["format"] for group in config_groups.values()} or {"dense"}
    config = {
        "quant_method": "aerogel" if scaled or beyond or split_at else "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": [name for name, part in module.named_modules() if _left_in_float(part)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    convs = [name for name, part in quantized.items() if isinstance(part, QuantConv2d)]
    if (clock := timestep_index_of(module)) is not None:
        config["clock"] = {"steps": list(clock.steps), "sampler": clock.sampler, "alone": list(clock.alone)}
    lists = {"scaled_inputs": scaled, "convolutions": convs, "splits": split_at}
    return config | {key: names for key, names in lists.items() if names}


def attach(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Put empty quantized linears where a quantization_config says, ready for the checkpoint's tensors.

    Raises AerogelError on a config that is not compressed-tensors or that says something this package cannot run.
    """
    for name, widths in config.get("splits", {}).items():
        split(module, name, widths)
    for name in config.get("scaled_inputs", ()):
        inner = module.get_submodule(name)
        assert isinstance(inner, nn.Linear)
        module.set_submodule(name, ScaledInput(inner, torch.ones(inner.in_features, dtype=inner.weight.dtype, device=inner.weight.device)))
    convs = set(config.get("convolutions", ()))
    for name, assigned in assignments(config, [*linears(module), *convs]).items():
        layer = module.get_submodule(name)
        assert isinstance(layer, Layer)
        module.set_submodule(name, empty(layer, assigned.scheme, assigned.act_order))
    if told := config.get("clock"):
        set_timestep_index(module, TimestepIndex(told["steps"], told["sampler"]), told["alone"])
    fuse_activations(module)


def fuse_activations(module: nn.Module) -> None:
    """Let kernels compute the activations behind quantized linears where they can; see fused.fuse."""
    if "diffusers.models.activations" in sys.modules:  # where it was never imported, nothing of it is in the module
        from aerogel.layers.fused_activations import fuse

        fuse(module)


def timestep_index_of(module: nn.Module) -> TimestepIndex | None:
    """The clock that layers of a denoiser follow, or None when no layer has one scale a step."""
    return next((part.clock for part in module.modules() if isinstance(part, QuantLinear) and part.clock is not None), None)


def set_timestep_index(module: nn.Module, clock: TimestepIndex, alone: Iterable[str]) -> None:
    """Let a denoiser's layers with one scale a step follow this clock from now on; see Clock.follow for `alone`."""
    for part in module.modules():
        if isinstance(part, QuantLinear) and part.scheme.inputs is not None and isinstance(part.scheme.inputs.granularity, PerStep):
            part.clock = clock
    clock.follow(module, alone)


def _beyond_compressed_tensors(part: QuantLinear) -> bool:
    inputs = part.scheme.inputs
    return isinstance(part, QuantConv2d) or (inputs is not None and isinstance(inputs.granularity, PerStep))


def linears(module: nn.Module) -> list[str]:
    """Full dotted names of the float linears."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def assignments(config: Mapping[str, Any], names: list[str]) -> dict[str, Assigned]:
    """Return which of the linears called `names` are quantized, and how; raises AerogelError like `attach`."""
    if config.get("quant_method") not in ("compressed-tensors", "aerogel"):
        raise AerogelError(
            f"quantization_config says quant_method={config.get('quant_method')!r}; only compressed-tensors folders are opened"
        )
    if config.get("kv_cache_scheme"):
        warnings.warn("the folder's scales for a quantized KV cache are not used: keys and values stay in float", stacklevel=3)
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
    return pattern == "Linear" or (pattern.startswith("re:") and re.match(pattern[3:], name) is not None)


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
            f"quantization_config: {name} is not a group of linears with quantized weights and float outputs; it cannot be run"
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
    match args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group"):
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
