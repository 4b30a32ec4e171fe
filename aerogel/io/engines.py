"""Serving engines by release, and the quantized layers that each opens: the facts behind "opens in" in plans.

They are those of the source of each release: the schemes that its compressed-tensors reader accepts, and the kernels that it then has.
Releases that agree share an entry. vLLM 0.33 differs from 0.32 on CPUs only, where it has an operator to quantize to float8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from aerogel.errors import AerogelError
from aerogel.io import gguf_contract
from aerogel.layers.layout import format_of
from aerogel.numerics.scheme import PerBlock, PerChannel, PerGroup, PerStep, PerTensor, Scheme

Reason = str | None
"""Why something is not accepted; None where it is."""

FUSED_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""The layers of one module that vLLM and SGLang load as one tensor, by name: for folders, whose layers cannot be watched while they run."""


class StoredLayer(NamedTuple):
    """A quantized linear layer as an engine meets it."""

    scheme: Scheme
    inputs: int
    outputs: int
    act_order: bool = False
    """True where columns were ordered by activations, so that groups, if there are any, have indices."""
    expert: bool = False
    """True for a layer of a routed expert, which engines join with the others of its kind."""


class StoredModel(NamedTuple):
    """A model as an engine meets it, its quantized layers apart."""

    config: Any
    """Its configuration; None where it has none."""
    folder: Path | None
    """The folder that its tokenizer is copied from; None where it is in memory only."""


class ServedPolicy(NamedTuple):
    """Settings of a runtime policy for engines that do the same themselves."""

    entries: Mapping[str, Any] = {}
    """Entries of quantization_config."""
    arguments: Mapping[str, Any] = {}
    """Arguments of vLLM's command line."""


class Instructions(IntEnum):
    """Instruction sets of x86 processors that kernels need for right results; each contains those before it."""

    ANY = 0
    AVX512 = 1
    VNNI = 2
    AMX = 3

    def __str__(self) -> str:
        return {Instructions.AVX512: "AVX-512", Instructions.VNNI: "AVX-512 VNNI"}.get(self, self.name)


def _any_model(model: StoredModel) -> Iterator[str]:
    yield from ()


def _any_processor(layer: StoredLayer) -> Instructions:
    return Instructions.ANY


def _no_arguments(arguments: Mapping[str, Any], config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Engine:
    """A release of an engine on a kind of device."""

    label: str
    refuses: Callable[[StoredLayer], Reason]
    """Why it does not open a layer."""
    refuses_cache: Callable[[Mapping[str, Any]], Reason]
    """Why it does not quantize its key-value cache by a `kv_cache_scheme`, of fp8 with static scales."""
    fuses: bool = True
    """True where it loads some layers as one tensor, such as query, key and value."""
    refuses_model: Callable[[StoredModel], Iterator[str]] = _any_model
    """Why it does not run a model, reason by reason, whatever its layers are."""
    takes: Callable[[Mapping[str, Any], Any], bool] = _no_arguments
    """True where it does what these arguments of vLLM's command line say, given the model's configuration."""
    needs: Callable[[StoredLayer], Instructions] = _any_processor
    """The instruction set of an x86 processor that its kernel for a layer needs."""
    cache_needs: Instructions = Instructions.ANY
    """The instruction set that it needs for a quantized key-value cache."""


def _inexpressible(layer: StoredLayer) -> Reason:
    inputs = layer.scheme.inputs
    if inputs is not None and isinstance(inputs.granularity, PerStep):
        return "one input scale per denoising step is not in compressed-tensors"
    return None


def _transformers(layer: StoredLayer) -> Reason:
    if layer.expert and format_of(layer.scheme) != "pack-quantized":
        return "of experts it joins packed integers only; call aerogel.register_transformers() before"
    if layer.act_order and layer.scheme.group:
        return "groups in activation order are gone from compressed-tensors since 0.19; set act_order to static"
    if not layer.scheme.weights.symmetric and format_of(layer.scheme) == "pack-quantized":
        return "compressed-tensors 0.18 and later expect zero points unpacked there; call aerogel.register_transformers() before"
    return _inexpressible(layer)


def _weights_only(layer: StoredLayer) -> Reason:
    """Integer weights with float inputs."""
    granular = isinstance(layer.scheme.weights.granularity, PerChannel | PerGroup)
    return None if granular else "integer weights need a scale per channel or group"


def _int8(layer: StoredLayer) -> Reason:
    """Integer weights and inputs of 8 bits."""
    weights = layer.scheme.weights
    if not weights.symmetric or not isinstance(weights.granularity, PerTensor | PerChannel):
        return "8-bit inputs need symmetric weights with a scale per channel or tensor"
    return None


def _vllm(layer: StoredLayer) -> Reason:
    scheme, separate = layer.scheme, "needs its Humming kernel, which is installed separately"
    if found := _of_vllm(layer):
        return found
    return separate if scheme.weights.format.kind == "int" and scheme.bits not in (4, 8) else None


def _vllm_032_on_cpu(layer: StoredLayer) -> Reason:
    weights = layer.scheme.weights
    if weights.format.kind == "float" and layer.scheme.bits == 8 and isinstance(weights.granularity, PerTensor) and not layer.expert:
        return "it has no operator on a CPU to give layers that it loads as one tensor a common scale per tensor"
    return _vllm_on_cpu(layer)


def _vllm_on_cpu(layer: StoredLayer) -> Reason:
    scheme = layer.scheme
    if found := _of_vllm(layer):
        return found
    if layer.expert and scheme.name not in ("W4A16", "W4A16_G128", "W8A8", "FP8_BLOCK"):
        return "of experts its kernels on a CPU take W4A16 in groups of 128, W8A8 and FP8_BLOCK"
    if scheme.weights.format.kind == "float":
        return None if scheme.bits == 8 else "it has no kernel for 4-bit floats on a CPU"
    if scheme.inputs is not None and scheme.bits == 8:
        return None
    if scheme.bits != 4:
        return "its kernels take weights of 4 bits on a CPU"
    return "inputs and outputs have to be multiples of 32" if layer.inputs % 32 or layer.outputs % 32 else None


def _vllm_needs(layer: StoredLayer) -> Instructions:
    """Return what kernels of vLLM's CPU build need.

    Those of experts and of float8 blocks need AMX, and 4-bit integers AVX-512. Products of 8-bit integers are of oneDNN, which lets 16-bit
    sums overflow without VNNI.
    """
    scheme = layer.scheme
    if layer.expert or isinstance(scheme.weights.granularity, PerBlock):
        return Instructions.AMX
    if scheme.weights.format.kind == "float":
        return Instructions.ANY
    return Instructions.AVX512 if scheme.bits == 4 else Instructions.VNNI


def _of_vllm(layer: StoredLayer) -> Reason:
    """Return why vLLM refuses a layer on any device."""
    scheme = layer.scheme
    if layer.act_order and layer.scheme.group:
        return "its reader has no group indices; set act_order to static"
    if found := _inexpressible(layer):
        return found
    if scheme.weights.format.kind == "float":
        return None
    if scheme.inputs is None:
        return _weights_only(layer)
    if scheme.bits == 8:
        return _int8(layer)
    return None if scheme.inputs.dynamic else "static inputs are for 8-bit weights only"


PRUNES_VIDEOS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Models, by the model_type of their configuration, whose videos vLLM prunes; of the others it ignores the rate."""


def vllm_takes(arguments: Mapping[str, Any], config: Any) -> bool:
    """Return True where vLLM does what arguments say on a model of this configuration."""
    return arguments.keys() == {"video-pruning-rate"} and getattr(config, "model_type", None) in PRUNES_VIDEOS


def _sglang(layer: StoredLayer) -> Reason:
    scheme = layer.scheme
    if found := _inexpressible(layer):
        return found
    if scheme.weights.format.kind == "float":
        return "it has no reader for MXFP4 weights with 16-bit inputs" if scheme.weights.scale_format == "e8m0" else None
    if scheme.inputs is not None:
        return _int8(layer) if scheme.bits == 8 else "integer weights below 8 bits need float inputs"
    if scheme.bits not in (4, 8):
        return "its kernels take weights of 4 and 8 bits"
    return _weights_only(layer) or (None if scheme.group in (None, 32, 64, 128) else "groups have to be of 32, 64 or 128")


def _llama_cpp(layer: StoredLayer) -> Reason:
    return gguf_contract.columns_reason(layer.inputs) or gguf_contract.scheme_reason(layer.scheme, layer.act_order)


def _llama_cpp_model(model: StoredModel) -> Iterator[str]:
    if not hasattr(model.config, "model_type"):
        yield "it runs models of transformers, and this one has no config of it"
        return
    reasons = list(gguf_contract.model_reasons(model.config))
    yield from reasons
    if not reasons and model.folder is not None and (reason := gguf_contract.tokenizer_reason(model.folder, model.config.vocab_size)):
        yield reason


def _any_cache(scheme: Mapping[str, Any]) -> Reason:
    return None


def _cache_by_tensor(scheme: Mapping[str, Any]) -> Reason:
    return None if scheme["strategy"] == "tensor" else "its key-value cache has one scale per tensor; set granularity to tensor"


def _no_cache(scheme: Mapping[str, Any]) -> Reason:
    return "GGUF has no place for the scales of a key-value cache; the weights open without it"


def _vllm_cpu(label: str, refuses: Callable[[StoredLayer], Reason]) -> Engine:
    return Engine(label, refuses, _cache_by_tensor, takes=vllm_takes, needs=_vllm_needs, cache_needs=Instructions.AVX512)


ENGINES: Mapping[str, Engine] = {
    "transformers": Engine("transformers 5.23 (compressed-tensors 0.20)", _transformers, _any_cache, fuses=False),
    "vllm": Engine("vLLM 0.32 and 0.33 (CUDA)", _vllm, _any_cache, takes=vllm_takes),
    "vllm-cpu": _vllm_cpu("vLLM 0.32 (CPU)", _vllm_032_on_cpu),
    "vllm-cpu-0.33": _vllm_cpu("vLLM 0.33 (CPU)", _vllm_on_cpu),
    "sglang": Engine("SGLang 0.5.23 (CUDA)", _sglang, _cache_by_tensor),
    "llama.cpp": Engine("llama.cpp (exported as gguf)", _llama_cpp, _no_cache, fuses=False, refuses_model=_llama_cpp_model),
}
"""Engines by the name that `--for` takes."""


def engine_of(name: str | None) -> Engine | None:
    """Return the engine of this name, None for none; raises AerogelError for another."""
    if name is None:
        return None
    if name not in ENGINES:
        raise AerogelError(f"engine {name!r} is unknown; expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def refusals(
    engine: Engine,
    model: StoredModel,
    layers: Sequence[StoredLayer],
    policies: Mapping[str, ServedPolicy],
    mixed: bool,
    denoises: bool,
) -> Iterator[str]:
    """Say why an engine does not open, or does not run as measured, what a recipe makes: reason by reason, with how many layers have it.

    `policies` are the runtime policies with what they leave to engines that do the same. `mixed` says that layers which engines load as one
    tensor have several schemes.
    """
    if denoises:
        yield "it runs language models, and this is a denoiser"
        return
    yield from engine.refuses_model(model)
    found: dict[tuple[str, str], int] = {}
    for layer in layers:
        if reason := engine.refuses(layer):
            found[str(layer.scheme), reason] = found.get((str(layer.scheme), reason), 0) + 1
    for (scheme, reason), count in found.items():
        yield f"{scheme} ({count} layer{'s' if count > 1 else ''}): {reason}"
    if mixed and engine.fuses:
        yield "layers that it loads as one tensor have several schemes"
    for name, policy in policies.items():
        if "kv_cache_scheme" in policy.entries:
            if reason := engine.refuses_cache(policy.entries["kv_cache_scheme"]):
                yield f"{name}: {reason}"
        elif not engine.takes(policy.arguments, model.config):
            yield f"{name} acts in aerogel only; the weights open without it"


def instructions(engine: Engine, layers: Sequence[StoredLayer], policies: Mapping[str, ServedPolicy]) -> Instructions:
    """Return the instruction set that an engine needs to open layers and to do what policies do."""
    cached = any("kv_cache_scheme" in policy.entries for policy in policies.values())
    return max([engine.cache_needs if cached else Instructions.ANY, *map(engine.needs, layers)])
