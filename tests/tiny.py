"""Every supported family, tiny, on CPU: built offline from config classes, with seeded weights that hide no mistake.

Norm weights and biases are random, so that a fold that forgets one of them shows; gates that start at zero are not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from aerogel.engine.opening import families
from aerogel.io.load import family_of_module
from aerogel.io.names import Names
from aerogel.model.calls import Call
from aerogel.model.experts import unfuse
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests import tiny_vision
from tests.tiny_text import EXPERTS, HEADS, INNER, SHAPE, VOCABULARY, WIDTH, text
from tests.tiny_text import KV_HEADS as KV_HEADS  # for other tests
from tests.tiny_vision import IMAGE_TOKEN as IMAGE_TOKEN
from tests.tiny_vision import TILED
from tests.tiny_vision import VISION_START as VISION_START

Inputs = Callable[[int, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Tiny:
    """One small network and real inputs for it."""

    family: str
    """File name of its family in aerogel/families where it has one, else what it is a member of."""
    make: Callable[[], nn.Module]
    inputs: Inputs
    """(number of the call, generator) -> keyword arguments of one forward."""
    norm_offset: float = 0.0

    def build(self, seed: int = 0) -> nn.Module:
        """The network in evaluation mode, float32, the same for the same seed."""
        torch.manual_seed(seed)
        network = self.make().float().eval()
        fill(network, torch.Generator().manual_seed(seed), self.norm_offset)
        return network.requires_grad_(False)

    def calls(self, count: int = 2, seed: int = 0) -> list[Call]:
        """`count` forwards of different shape or content."""
        generator = torch.Generator().manual_seed(seed)
        return [Call((), self.inputs(number, generator)) for number in range(count)]


def fill(network: nn.Module, generator: torch.Generator, norm_offset: float = 0.0) -> None:
    """Give every parameter ordinary random values: unit gain for matrices, norms around one, biases that matter."""
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data = 1.0 - norm_offset + 0.2 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.1 * noise
        else:
            fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
            parameter.data = noise / fan_in**0.5


def output(network: nn.Module, call: Call) -> Tensor:
    """What the network answers to a call: logits or the denoiser's prediction."""
    with torch.no_grad():
        answer = network(*call.args, **call.kwargs)
    return answer.logits if hasattr(answer, "logits") else answer.sample


def _latent_image(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([900 - 300 * (number % 3), 40]),
        "class_labels": torch.randint(0, 10, (2,), generator=generator),
    }


def _text_to_image(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([900 - 300 * (number % 3), 40]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }


def _pixart_inputs(number: int, generator: torch.Generator) -> dict[str, Any]:
    inputs = _text_to_image(number, generator)
    return {"hidden_states": inputs.pop("sample"), **inputs}


def _unconditional(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 8, 8, generator=generator), "timestep": torch.tensor([900 - 300 * (number % 3), 40])}


def _latent_video(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([900 - 300 * (number % 3)]),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
    }


def _image_to_video(number: int, generator: torch.Generator) -> dict[str, Any]:
    """With an image, Wan expects 512 places of text."""
    inputs = _latent_video(number, generator)
    inputs["encoder_hidden_states"] = torch.randn(1, 512, 32, generator=generator)
    return inputs | {"encoder_hidden_states_image": torch.randn(1, 5, 16, generator=generator)}


def _joint_inputs(number: int, generator: torch.Generator) -> dict[str, Any]:
    return _pixart_inputs(number, generator) | {"pooled_projections": torch.randn(2, 32, generator=generator)}


def _packed_image(number: int, generator: torch.Generator) -> dict[str, Any]:
    """Latents of 4 x 4 patches as a row, with the place of each; time steps are shares of the way."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": torch.randn(2, 16, 32, generator=generator),
        "timestep": torch.tensor([0.9 - 0.3 * (number % 3), 0.04]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(7, 3),
    }


def _guided_image(number: int, generator: torch.Generator) -> dict[str, Any]:
    """Where the guidance scale is an input."""
    return _packed_image(number, generator) | {"guidance": torch.full((2,), 3.5)}


def _joint_video(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([900 - 300 * (number % 3), 40]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }


def _rotary_video(number: int, generator: torch.Generator) -> dict[str, Any]:
    """With angles for 2 x 4 x 4 patches and an offset."""
    inputs = _joint_video(number, generator)
    inputs["hidden_states"] = torch.randn(2, 4, 4, 8, 8, generator=generator)
    angles = torch.outer(torch.arange(32.0), 0.1 * torch.arange(1.0, 9.0)).repeat_interleave(2, dim=1)
    return inputs | {"image_rotary_emb": (angles.cos(), angles.sin()), "ofs": torch.full((1,), 2.0)}


def _language(kind: str, config: str = "", **options: Any) -> nn.Module:
    """A causal language model of two layers; `kind` is the prefix of its classes in transformers."""
    options = SHAPE | options
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{config or kind}Config")(**options))


def _opt(**options: Any) -> nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": INNER, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape | options))


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        norm_num_groups=4,
    )  # fmt: skip


def _unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip


def _unet_pixels() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
    )  # fmt: skip


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=WIDTH, caption_channels=32, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip


def _wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=INNER,
        num_layers=2, rope_max_seq_len=32, **options,
    )  # fmt: skip


def _sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        joint_attention_dim=32, caption_projection_dim=WIDTH, pooled_projection_dim=32, pos_embed_max_size=8, **options,
    )  # fmt: skip


def _flux(**options: Any) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=32, num_layers=1, num_single_layers=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip


def _cogvideox(**options: Any) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=32, num_layers=2,
        sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=7, **options,
    )  # fmt: skip


_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_SHARED = {
    "num_key_value_heads": HEADS, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SOFT_CAPS = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny("llama", partial(_language, "Llama"), text),
    "mistral": Tiny("llama", partial(_language, "Mistral", sliding_window=8), text),
    "qwen2": Tiny("llama", partial(_language, "Qwen2", tie_word_embeddings=True), text),
    "smollm3": Tiny("llama", partial(_language, "SmolLM3", no_rope_layers=[1, 0]), text),
    "qwen3": Tiny("qwen3", partial(_language, "Qwen3", head_dim=32), text),
    "opt": Tiny("opt", _opt, text),
    "gemma2": Tiny("gemma2", partial(_language, "Gemma2", **_SOFT_CAPS), text, 1.0),
    "gemma3": Tiny("gemma3", partial(_language, "Gemma3", "Gemma3Text", **_SOFT_CAPS), text, 1.0),
    "phi3": Tiny("phi3", partial(_language, "Phi3"), text),
    "qwen3_moe": Tiny("qwen3_moe", partial(_language, "Qwen3Moe", head_dim=16, **EXPERTS), text),
    "mixtral": Tiny("mixtral", partial(_language, "Mixtral", num_local_experts=4, num_experts_per_tok=2), text),
    "deepseek_v3": Tiny("deepseek_v3", partial(_language, "DeepseekV3", **_LATENT, **_SHARED), text),
    "gpt_oss": Tiny(
        "gpt_oss",
        partial(_language, "GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, **_PLAIN_ROPE),
        text,
    ),
    "qwen3_vl_moe": Tiny("qwen3_vl_moe", tiny_vision.qwen3_vl_moe, tiny_vision.image_grid),
    "internvl": Tiny("internvl", tiny_vision.internvl, partial(tiny_vision.image_text, images={"pixel_values": (2, 3, 16, 16)}, tokens=4)),
    "qwen2_5_vl": Tiny("qwen2_5_vl", tiny_vision.qwen2_5_vl, tiny_vision.image_grid),
    "llava": Tiny("llava", tiny_vision.llava, partial(tiny_vision.image_text, images={"pixel_values": (2, 3, 16, 16)}, tokens=4)),
    "dit": Tiny("dit", _dit, _latent_image),
    "wan": Tiny("wan", _wan, _latent_video),
    "unet": Tiny("unet", _unet, _text_to_image),
    "pixart": Tiny("pixart", _pixart, _pixart_inputs),
    "sd3": Tiny("sd3", partial(_sd3, dual_attention_layers=(0,), qk_norm="rms_norm"), _joint_inputs),
    "flux": Tiny("flux", partial(_flux, guidance_embeds=True), _guided_image),
    "cogvideox": Tiny("cogvideox", _cogvideox, _joint_video),
}

LANGUAGE = sorted(name for name, tiny in FAMILIES.items() if tiny.inputs is text)
"""Families that read text alone."""

VARIANTS: dict[str, Tiny] = {
    "opt_350m": Tiny("opt", partial(_opt, do_layer_norm_before=False, word_embed_proj_dim=32), text),
    "galactica": Tiny("opt", partial(_opt, activation_function="gelu", enable_bias=False), text),
    "qwen3_moe_dense": Tiny("qwen3_moe", partial(_language, "Qwen3Moe", head_dim=16, mlp_only_layers=[1], **EXPERTS), text),
    "unet_pixels": Tiny("unet", _unet_pixels, _unconditional),
    "sd3_medium": Tiny("sd3", _sd3, _joint_inputs),
    "flux_schnell": Tiny("flux", _flux, _packed_image),
    "cogvideox_i2v": Tiny(
        "cogvideox", partial(_cogvideox, use_rotary_positional_embeddings=True, patch_size_t=2, ofs_embed_dim=32), _rotary_video
    ),
    "wan_i2v": Tiny("wan", partial(_wan, image_dim=16, added_kv_proj_dim=WIDTH), _image_to_video),
}
"""Members of a family for which some of its data does not hold or looks otherwise; for the families' own tests."""

NEAR: dict[str, Tiny] = {
    "qwen2_vl": Tiny("qwen2_vl", tiny_vision.qwen2_vl, tiny_vision.image_grid),
    "qwen3_vl": Tiny("qwen3_vl", tiny_vision.qwen3_vl, tiny_vision.image_grid),
    "llava_next": Tiny("llava_next", tiny_vision.llava_next, partial(tiny_vision.tiled, tiles=TILED["llava_next"])),
    "llava_onevision": Tiny("llava_onevision", tiny_vision.llava_onevision, partial(tiny_vision.tiled, tiles=TILED["llava_onevision"])),
}
"""More vision-language models, for tests of image tokens."""

TINY: dict[str, Tiny] = FAMILIES | VARIANTS | NEAR


def opened(name: str) -> Network:
    """A tiny network with its family, its experts one by one, as `aerogel.load` opens it."""
    tiny = TINY[name]
    module = tiny.build()
    names = Names.of(module)
    unfuse(module, names.experts)
    network = Network(module, family_of_module(families(), module), names=names)
    network.discover()
    return network


def family_of(name: str) -> Family:
    """The family of a tiny network, as `aerogel.load` finds it."""
    return family_of_module(families(), TINY[name].build())
