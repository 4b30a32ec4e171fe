"""transformers and diffusers open our folders: a quantizer of our own puts quantized layers in place before weights are read."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.io import empty_weight
from aerogel.io.names import Names
from aerogel.io.quantized import attach_for_readers
from aerogel.io.record import files
from aerogel.layers.experts import ExpertList, all_float
from aerogel.layers.transposed import as_conv1d, as_linears
from aerogel.model.experts import fuse, unfuse


class Method(StrEnum):
    """The names that our quantization_config goes by."""

    AEROGEL = "aerogel"
    COMPRESSED_TENSORS = "compressed-tensors"


def register_transformers() -> None:
    """Let transformers in this process open compressed folders with the layers and kernels of this package.

    Afterwards `from_pretrained(folder)` works for every architecture that was saved here, and weights stay packed. Without it transformers
    opens what compressed-tensors can express and unpacks it. Files of weights are compared with their checksums. Runtime policies are put
    on by `aerogel.load` only.
    """
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = type("AerogelConfig", (_Config, QuantizationConfigMixin), {})
    quantizer = type("AerogelQuantizer", (_TransformersQuantizer, HfQuantizer), {})
    for method in Method:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = config
        auto.AUTO_QUANTIZER_MAPPING[method.value] = quantizer


def register_diffusers() -> None:
    """Let diffusers in this process open folders that were saved here; raises AerogelError when diffusers is not installed.

    Afterwards `DiffusionPipeline.from_pretrained(folder)` works as for any other pipeline. Runtime policies are put on by
    `aerogel.load` only.
    """
    try:
        from diffusers.quantizers import auto
        from diffusers.quantizers.base import DiffusersQuantizer
        from diffusers.quantizers.quantization_config import QuantizationConfigMixin
    except ImportError as error:
        raise AerogelError("diffusers is not installed: pip install 'aerogel[diffusion]'") from error
    config = type("AerogelConfig", (_Config, QuantizationConfigMixin), {})
    quantizer = type("AerogelQuantizer", (_DiffusersQuantizer, DiffusersQuantizer), {})
    for method in Method:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = config
        auto.AUTO_QUANTIZER_MAPPING[method.value] = quantizer


class _Config:
    """Configuration as both libraries want it: a quantization_config that they pass on as it is."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.quant_method = Method(settings["quant_method"])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **_: Any) -> _Config:
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def __repr__(self) -> str:
        return f"AerogelConfig({self.quant_method})"


class _TransformersQuantizer:
    """Quantizer as transformers wants it."""

    quantization_config: _Config
    requires_calibration = True
    is_trainable = False

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> nn.Module:
        for folder in {Path(file).parent for file in given.get("checkpoint_files") or ()}:
            files.verify(folder)
        unfuse(model, Names.of(model).experts)
        as_linears(model)
        attach_for_readers(model, self.quantization_config.settings)
        as_conv1d(model)
        if name := self.quantization_config.settings.get(empty_weight.KEY):
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), f"^{re.escape(name)}$"}
        apart = _single_on_disk(model)
        # One rule of transformers puts the experts of all layers together: either all can take it or none.
        fuse(model, keep=() if all(map(all_float, apart)) else apart)
        tied = getattr(model, "all_tied_weights_keys", {})
        kept = dict(model.named_parameters(remove_duplicate=False)).keys()
        for pair in [pair for pair in tied.items() if not kept >= set(pair)]:
            del tied[pair[0]]  # quantized, both of them: each has codes of its own
        for name in [name for name, part in model.named_modules() if isinstance(part, ExpertList)]:
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            owner._is_hf_initialized = True  # its code would initialize fused experts
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Take away the rules that put experts together, where they are apart."""
        from transformers.core_model_loading import MergeModulelist, WeightConverter

        def merges(conversion: Any) -> bool:
            return isinstance(conversion, WeightConverter) and any(isinstance(step, MergeModulelist) for step in conversion.operations)

        apart = _single_on_disk(model)
        return [conversion for conversion in weight_conversions if not (apart and merges(conversion))]

    def is_serializable(self) -> bool:
        """Return False: `Result.save` saves; transformers would write integer codes without their configuration."""
        return False


def _single_on_disk(model: nn.Module) -> list[ExpertList]:
    """Return the lists of experts whose float weights checkpoints hold one by one."""
    return [part for part in model.modules() if isinstance(part, ExpertList) and not part.names.fused_on_disk]


class _DiffusersQuantizer:
    """Quantizer as diffusers wants it."""

    quantization_config: _Config
    is_serializable = False  # `Result.save` saves; diffusers would write integer codes without their configuration
    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        attach_for_readers(model, self.quantization_config.settings)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def check_if_quantized_param(self, model: nn.Module, param_value: torch.Tensor, param_name: str, *_: Any, **__: Any) -> bool:
        """Codes and scales keep the dtype they are stored in; everything else takes that of the pipeline."""
        owner, name = param_name.rpartition(".")[::2]
        return name in model.get_submodule(owner)._buffers

    def create_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        owner, name = param_name.rpartition(".")[::2]
        model.get_submodule(owner)._buffers[name] = param_value.to(target_device)
