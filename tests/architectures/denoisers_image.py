"""Denoisers of images, tiny: transformers and UNets of diffusers."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.draws import CHANNELS, HEAD, SHAPE, TEXT, WIDTH, Denoiser, Draw

Inputs = dict[str, Any]
ROPE = (4, 6, 6)
PIXELS: Inputs = {**SHAPE, "in_channels": CHANNELS, "sample_size": 8, "patch_size": 2}
JOINT: Inputs = {**SHAPE, "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE}
COGVIEW: Inputs = {
    **PIXELS, "num_layers": 3, "out_channels": CHANNELS, "text_embed_dim": TEXT, "time_embed_dim": 32, "condition_dim": 32,
    "pos_embed_max_size": 16,
}  # fmt: skip
UNET: Inputs = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT, "attention_head_dim": 4,
}  # fmt: skip


def conditioned(draw: Draw) -> Inputs:
    return {"hidden_states": draw.image(), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}


def packed(draw: Draw) -> Inputs:
    return {"hidden_states": draw.packed(), "timestep": draw.shares(), "encoder_hidden_states": draw.text()}


def placed(draw: Draw) -> Inputs:
    return packed(draw) | draw.positions()


def unet(draw: Draw) -> Inputs:
    return {"sample": draw.image(16, 4), "timestep": draw.whole_steps(), "encoder_hidden_states": draw.text()}


def _cogview(draw: Draw) -> Inputs:
    sizes = {"original_size": draw.full(8.0, 2), "target_size": draw.full(8.0, 2), "crop_coords": draw.full(0.0, 2)}
    return {**conditioned(draw), "timestep": draw.whole_steps(), **sizes}


def _hunyuan(draw: Draw) -> Inputs:
    return {
        **conditioned(draw), "text_embedding_mask": draw.full(1.0, 4), "encoder_hidden_states_t5": draw.text(),
        "text_embedding_mask_t5": draw.full(1.0, 4), "image_meta_size": draw.full(1.0, 6),
        "style": torch.zeros(draw.batch, dtype=torch.long), "image_rotary_emb": draw.angles(16),
    }  # fmt: skip


def _omnigen(draw: Draw) -> Inputs:
    """One image after five tokens and the time step."""
    length = 5 + 1 + 16
    return {
        "hidden_states": draw.image(), "timestep": draw.shares(), "input_ids": torch.arange(5).expand(draw.batch, 5),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(draw.batch, length, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(draw.batch, length),
    }  # fmt: skip


def _z_image(draw: Draw) -> Inputs:
    """Images and prompts as lists, each of its own size."""
    images = [torch.randn(CHANNELS, 1, 8, 8, generator=draw.generator) for _ in range(draw.batch)]
    prompts = [torch.randn(draw.tokens, TEXT, generator=draw.generator) for _ in range(draw.batch)]
    return {"x": images, "t": draw.shares(), "cap_feats": prompts}


def _hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.image(), "timesteps": draw.steps(), "encoder_hidden_states_t5": draw.text(),
        "encoder_hidden_states_llama3": torch.randn(2, draw.batch, draw.tokens, TEXT, generator=draw.generator),
        "pooled_embeds": draw.noise(TEXT),
    }  # fmt: skip


def _lumina_next(draw: Draw) -> Inputs:
    turns = torch.rand(384, 384, HEAD // 2, generator=draw.generator)
    inputs = {**conditioned(draw), "encoder_mask": draw.mask(torch.float32), "cross_attention_kwargs": {}}
    return inputs | {"image_rotary_emb": torch.polar(torch.ones_like(turns), turns)}


def _sdxl(draw: Draw) -> Inputs:
    return unet(draw) | {"added_cond_kwargs": {"text_embeds": draw.noise(TEXT), "time_ids": draw.full(1.0, 6)}}


def pooled(inputs: Inputs, draw: Draw) -> Inputs:
    return inputs | {"pooled_projections": draw.noise(TEXT)}


def guided(inputs: Inputs, draw: Draw) -> Inputs:
    return inputs | {"guidance": draw.full(3.5)}


def masked(inputs: Inputs, draw: Draw, name: str = "encoder_attention_mask") -> Inputs:
    return inputs | {name: draw.mask()}


def _qwen(draw: Draw) -> Inputs:
    return masked(packed(draw), draw, "encoder_hidden_states_mask") | {"img_shapes": [[(1, 4, 4)]] * draw.batch}


DENOISERS: dict[str, Denoiser] = {
    "DiTTransformer2DModel": Denoiser(
        lambda d: {"hidden_states": d.image(), "timestep": d.steps(), "class_labels": torch.tensor([1, 2])[: d.batch]},
        {**PIXELS, "num_layers": 3, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
    ),
    "PixArtTransformer2DModel": Denoiser(
        conditioned,
        {
            **PIXELS, "out_channels": CHANNELS, "num_layers": 3, "cross_attention_dim": WIDTH, "caption_channels": TEXT,
            "norm_num_groups": 4, "use_additional_conditions": False,
        },
    ),
    "SD3Transformer2DModel": Denoiser(
        lambda d: pooled(conditioned(d), d),
        {
            **PIXELS, "out_channels": CHANNELS, "num_layers": 3, "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH,
            "pooled_projection_dim": TEXT, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
    ),
    "FluxTransformer2DModel": Denoiser(
        lambda d: guided(pooled(placed(d), d), d), {**JOINT, "pooled_projection_dim": TEXT, "guidance_embeds": True}
    ),
    "Flux2Transformer2DModel": Denoiser(
        lambda d: guided(packed(d) | d.positions(4), d),
        {**JOINT, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": True},
    ),
    "ChromaTransformer2DModel": Denoiser(
        placed, {**JOINT, "approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 2}
    ),
    "BriaTransformer2DModel": Denoiser(placed, {**JOINT, "axes_dims_rope": list(ROPE)}),
    "QwenImageTransformer2DModel": Denoiser(
        _qwen,
        {
            **SHAPE, "patch_size": 2, "in_channels": 32, "out_channels": CHANNELS, "num_layers": 3, "joint_attention_dim": TEXT,
            "axes_dims_rope": ROPE,
        },
    ),
    "SanaTransformer2DModel": Denoiser(
        conditioned,
        {
            **SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": HEAD, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8,
        },
    ),
    "Lumina2Transformer2DModel": Denoiser(
        lambda d: masked(conditioned(d), d),
        {
            "sample_size": 8, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 2,
            "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32, "axes_dim_rope": ROPE, "axes_lens": (64, 64, 64),
            "cap_feat_dim": TEXT,
        },
    ),
    "LuminaNextDiT2DModel": Denoiser(
        _lumina_next,
        {
            "sample_size": 8, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": 4,
            "num_kv_heads": 2, "multiple_of": 32, "cross_attention_dim": TEXT,
        },
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        lambda d: conditioned(d) | {"timestep": d.shares()},
        {
            **PIXELS, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT,
            "caption_projection_dim": WIDTH, "pos_embed_max_size": 64,
        },
    ),
    "CogView3PlusTransformer2DModel": Denoiser(_cogview, COGVIEW),
    "CogView4Transformer2DModel": Denoiser(_cogview, {**COGVIEW, "rope_axes_dim": (16, 16)}),
    "HunyuanDiT2DModel": Denoiser(
        _hunyuan,
        {
            **PIXELS, "hidden_size": WIDTH, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": TEXT,
            "cross_attention_dim_t5": TEXT, "pooled_projection_dim": TEXT, "text_len": 4, "text_len_t5": 4, "learn_sigma": False,
        },
        tokens=4,
    ),
    "OmniGenTransformer2DModel": Denoiser(
        _omnigen,
        {
            "in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
            "num_layers": 3, "pad_token_id": 0, "vocab_size": 128, "max_position_embeddings": 256,
            "original_max_position_embeddings": 128, "pos_embed_max_size": 16, "time_step_dim": 32,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
    ),
    "ZImageTransformer2DModel": Denoiser(
        _z_image,
        {
            "in_channels": CHANNELS, "dim": WIDTH, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4,
            "cap_feat_dim": TEXT, "axes_dims": list(ROPE), "axes_lens": [128, 64, 64],
        },
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        _hidream,
        {
            **SHAPE, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "num_single_layers": 2,
            "caption_channels": [TEXT, TEXT], "text_emb_dim": TEXT, "num_routed_experts": 4, "num_activated_experts": 2,
            "axes_dims_rope": ROPE, "max_resolution": (8, 8), "llama_layers": [0, 1, 1, 0], "force_inference_output": True,
        },
    ),
    "PRXTransformer2DModel": Denoiser(
        lambda d: masked(conditioned(d), d, "attention_mask") | {"timestep": d.shares()},
        {
            "in_channels": CHANNELS, "context_in_dim": TEXT, "hidden_size": WIDTH, "num_heads": 4, "depth": 3, "axes_dim": [8, 8],
            "mlp_ratio": 2.0,
        },
    ),
    "UNet2DConditionModel": Denoiser(unet, UNET),
    "UNet2DConditionModel-sdxl": Denoiser(
        _sdxl,
        {
            **UNET, "transformer_layers_per_block": 2, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        },
        class_name="UNet2DConditionModel",
    ),
    "UNet2DModel": Denoiser(
        lambda d: {"sample": d.image(16, 3), "timestep": d.whole_steps()},
        {
            "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1,
            "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16,
        },
    ),
}  # fmt: skip
