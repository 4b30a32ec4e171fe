"""The layout of NVIDIA Model Optimizer's checkpoints (ModelOpt): FP8 and NVFP4 weights with float32 scales, one algorithm for all layers.

FP8: weight (O, I), weight_scale () and input_scale (). FP8_PER_CHANNEL_PER_TOKEN: weight (O, I) and weight_scale (O).
FP8_PB_WO: weight (O, I) and weight_scale (O / 128, 1, I / 128, 1); readers round inputs too, in groups of 128, in spite of its name.
W4A16_NVFP4: weight (O, I / 2), weight_scale (O, I / 16) and weight_scale_2 (), the reciprocal of the master's global scale.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.export.engine_rules import ambiguous, denoises, experts_of, on_disk, unquantized, violations
from aerogel.export.exporter import Exporter, Master, SavedPolicy, Source, not_language, unsuitable_layers
from aerogel.io import kv_scales
from aerogel.io.quantized import configs_in
from aerogel.io.save import copy_companions, new_folder
from aerogel.io.shards import write_shards
from aerogel.layers.replacement import Assigned
from aerogel.numerics.scheme import Scheme
from aerogel.options import Bytes
from aerogel.version import __version__

_FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float"}
_ALGORITHMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "FP8_STATIC": ("FP8", {"weights": {**_FLOAT8, "dynamic": False}, "input_activations": {**_FLOAT8, "dynamic": False}}),
    "FP8_DYNAMIC": (
        "FP8_PER_CHANNEL_PER_TOKEN",
        {
            "weights": {**_FLOAT8, "dynamic": False, "strategy": "channel"},
            "input_activations": {**_FLOAT8, "dynamic": True, "strategy": "token"},
        },
    ),
    "FP8_BLOCK": ("FP8_PB_WO", None),
    "NVFP4A16": ("W4A16_NVFP4", {"weights": {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}}),
}
"""By scheme, the algorithm's name and its config group, if ModelOpt writes one."""
_DENOISERS = ("FP8_STATIC", "FP8_DYNAMIC")
"""Schemes that engines read for diffusion transformers."""
_EXPERTS = ("FP8_STATIC", "NVFP4A16")
"""Schemes that engines read for experts."""
_VISION = ("vision_tower", "vision_model", "vit_large_projector")
"""Parts of names by which vLLM leaves layers in 16 bits whatever the config says."""


@dataclass(frozen=True)
class ModelOpt(Exporter):
    """NVIDIA ModelOpt's layout: FP8 (static, dynamic or block) and NVFP4 weights of language models, FP8 of diffusion transformers."""

    max_shard_size: Bytes = 5_000_000_000
    """Largest size of one weight file in bytes."""

    def refuse(self, source: Source) -> list[str]:
        """Other schemes, several schemes, layers that readers would misread, and denoisers that are no transformers."""
        try:
            source = source.denoiser
        except AerogelError as error:  # several denoisers
            return [str(error)]
        master = Master.open(source)
        reasons = _wrong_model(master) or unsuitable_layers(master, lambda name: _reason(master.linears[name], denoises(master)))
        if reasons:
            return reasons
        if len(schemes := {_preset(assigned.scheme) for assigned in master.linears.values()}) > 1:
            reasons.append(f"its layers have several schemes ({', '.join(sorted(map(str, schemes)))}), and this format has one for all")
        return reasons + (ambiguous(master) if denoises(master) else [*violations(master), *_experts(master), *_vision(master)])

    def carries(self, policy: SavedPolicy) -> bool:
        """Return True for a key-value cache in FP8 with a scale per tensor."""
        return _is_written(policy.method.config_entries)

    def write(self, source: Source, output: Path) -> None:
        """Write the layout layer by layer; of a pipeline, the sub-folder of its denoiser, with the other parts as they are."""
        self.accept(source)
        part = source.denoiser
        master, place = Master.open(part), part.folder.relative_to(source.folder)
        config = copy.deepcopy(master.config)
        for each in configs_in(config):
            each.pop("quantization_config", None)
        skipped = unquantized(master)
        with new_folder(output) as target:
            copy_companions(source.folder, target, [str(place)])
            write_shards(target / place, _tensors(master), "diffusion_pytorch_model" if denoises(master) else "model", self.max_shard_size)
            config["quantization_config"] = _quantization_config(master, skipped)
            (target / place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if not denoises(master):
                (target / "hf_quant_config.json").write_text(json.dumps(_hf_quant_config(master, skipped), indent=2) + "\n")


def _wrong_model(master: Master) -> list[str]:
    name = str(master.config.get("_class_name", master.family.name))
    if denoises(master):
        return [] if "Transformer" in name else [f"engines that read this format run diffusion transformers, not {name}"]
    return not_language(master)


def _preset(scheme: Scheme) -> str | None:
    """Return the name of the scheme among those that the layout has, whatever a recipe or a config calls it."""
    return next((name for name in _ALGORITHMS if _same(Scheme.parse(name), scheme)), None)


def _same(one: Scheme, other: Scheme) -> bool:
    return (one.weights, one.inputs) == (other.weights, other.inputs)


def _reason(assigned: Assigned, denoiser: bool) -> str | None:
    preset = _preset(assigned.scheme)
    known = _DENOISERS if denoiser else tuple(_ALGORITHMS)
    if preset in known and not assigned.act_order:
        return None
    model = "diffusion transformers" if denoiser else "language models"
    return f"{assigned.scheme} is none of the schemes that this format has for {model}: {', '.join(known)}"


def _experts(master: Master) -> Iterator[str]:
    """Say that experts have several scales, which readers take for one scale each."""
    for name, assigned in master.linears.items():
        if experts_of(name) and (preset := _preset(assigned.scheme)) not in _EXPERTS:
            yield f"{name}: readers of this format take experts in {' or '.join(_EXPERTS)}, not in {preset}"
            return


def _vision(master: Master) -> Iterator[str]:
    for name in master.linears:
        if part := next((part for part in _VISION if part in name), None):
            yield f"{name} is quantized, and vLLM takes all layers under {part} for 16-bit ones"
            return


def _tensors(master: Master) -> Iterator[tuple[str, Tensor]]:
    for name in master.floats:
        yield on_disk(master, name), master.checkpoint.tensor(name)
    for name, assigned in master.linears.items():
        for part, tensor in _layer(master, name, assigned.scheme).items():
            yield on_disk(master, f"{name}.{part}"), tensor
    yield from _cache_tensors(master)


def _is_written(config: Mapping[str, Any]) -> bool:
    """Return True for a quantization_config, or entries of it, with FP8 scales of keys and values that the layout has."""
    scheme = kv_scales.scheme_in(config) or {}
    return (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy")) == (8, "float", "tensor") and not scheme.get("dynamic")


def _cache_tensors(master: Master) -> Iterator[tuple[str, Tensor]]:
    """Yield the scales of keys and values, which the layout has in the layers that make them."""
    if _is_written(master.quantization):
        for name, scale in kv_scales.read(master.folder, master.quantization).items():
            attention, _, part = name.rpartition(".")
            layer = f".{part[0]}_proj" if attention.endswith(".self_attn") else ""
            yield f"{attention}{layer}.{part}", scale.reshape(())


def _layer(master: Master, name: str, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer; scales become float32, which changes no value."""

    def stored(part: str) -> Tensor:
        return master.checkpoint.tensor(f"{name}.{part}")

    match _preset(scheme):
        case "FP8_STATIC":
            scales = {part: stored(part).float().reshape(()) for part in ("weight_scale", "input_scale")}
            return {"weight": stored("weight"), **scales}
        case "FP8_DYNAMIC":
            return {"weight": stored("weight"), "weight_scale": stored("weight_scale").float().flatten()}
        case "FP8_BLOCK":
            return {"weight": stored("weight"), "weight_scale": stored("weight_scale").float()[:, None, :, None]}
        case _:
            outer = stored("weight_global_scale").float().reciprocal().reshape(())
            return {"weight": stored("weight_packed"), "weight_scale": stored("weight_scale"), "weight_scale_2": outer}


def _algorithm(master: Master) -> tuple[str, dict[str, Any] | None]:
    preset = _preset(next(iter(master.linears.values())).scheme)
    assert preset is not None
    return _ALGORITHMS[preset]


def _producer() -> dict[str, str]:
    # Readers know the layout by this name.
    return {"name": "modelopt", "version": f"aerogel-{__version__}"}


def _quantization_config(master: Master, skipped: list[str]) -> dict[str, Any]:
    """Return the quantization_config of config.json."""
    algorithm, group = _algorithm(master)
    cache = {"kv_cache_scheme": {**_FLOAT8, "dynamic": False}} if _is_written(master.quantization) else {}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        **({} if group is None else {"config_groups": {"group_0": {**group, "targets": ["Linear"]}}}),
        "ignore": skipped,
        **cache,
        "producer": _producer(),
    }


def _hf_quant_config(master: Master, skipped: list[str]) -> dict[str, Any]:
    """Return the content of hf_quant_config.json, which some readers prefer."""
    algorithm, group = _algorithm(master)
    size = None if group is None else group["weights"].get("group_size")
    sized = {} if size is None else {"group_size": size}
    cache = "FP8" if _is_written(master.quantization) else None
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": cache, **sized, "exclude_modules": skipped}
    return {"producer": _producer(), "quantization": quantization}
