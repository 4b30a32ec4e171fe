"""diffusers opens our folders: a quantizer of its own kind that puts quantized layers in place before it reads the weights."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.io.quantized import attach


class Method(StrEnum):
    """The names that our quantization_config goes by."""

    AEROGEL = "aerogel"
    COMPRESSED_TENSORS = "compressed-tensors"


def register_diffusers() -> None:
    """Teach diffusers in this process to open folders that were saved here; raises AerogelError when diffusers is not installed.

    Afterwards `DiffusionPipeline.from_pretrained(folder)` works as for any other pipeline. Runtime policies are put on by
    `aerogel.load` only.
    """
    try:
        from diffusers.quantizers import auto
        from diffusers.quantizers.base import DiffusersQuantizer
        from diffusers.quantizers.quantization_config import QuantizationConfigMixin
    except ImportError as error:
        raise AerogelError("diffusers is not installed: pip install 'aerogel[diffusion]'") from error
    for method in Method:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = type("AerogelConfig", (_Config, QuantizationConfigMixin), {})
        auto.AUTO_QUANTIZER_MAPPING[method.value] = type("AerogelQuantizer", (_Quantizer, DiffusersQuantizer), {})


class _Config:
    """Configuration as diffusers wants it: a quantization_config that it passes on as it is."""

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


class _Quantizer:
    """Quantizer as diffusers wants it."""

    quantization_config: _Config
    is_serializable = False  # aerogel saves; diffusers would write integer codes without their configuration
    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        attach(model, self.quantization_config.settings)
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
