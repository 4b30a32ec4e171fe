"""Transformers of diffusers that denoise images, tiny."""

from __future__ import annotations

import torch

from tests.architectures.draws import (
    CHANNELS,
    HEAD,
    SHAPE,
    TEXT,
    WIDTH,
    Denoiser,
    Draw,
    Inputs,
    guided,
    image,
    masked,
    packed,
    placed,
    pooled,
)

ROPE = (4, 6, 6)
PIXELS: Inputs = {**SHAPE, "in_channels": CHANNELS, "sample_size": 8, "patch_size": 2}
JOINT: Inputs = {**SHAPE, "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE}
GLM: Inputs = {
    **SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2, "num_layers": 3, "text_embed_dim": TEXT,
    "time_embed_dim": 32, "condition_dim": 32,
}  # fmt: skip
COGVIEW: Inputs = {**GLM, "sample_size": 8, "pos_embed_max_size": 16}


def _cogview(draw: Draw) -> Inputs:
    sizes = {"original_size": draw.full(8.0, 2), "target_size": draw.full(8.0, 2), "crop_coords": draw.full(0.0, 2)}
    return {**image(draw), "timestep": draw.whole_steps(), **sizes}


def _hunyuan(draw: Draw) -> Inputs:
    return {
        **image(draw),
        "text_embedding_mask": draw.full(1.0, 4),
        "encoder_hidden_states_t5": draw.text(),
        "text_embedding_mask_t5": draw.full(1.0, 4),
        "image_meta_size": draw.full(1.0, 6),
        "style": torch.zeros(draw.batch, dtype=torch.long),
        "image_rotary_emb": draw.angles(16),
    }


def _omnigen(draw: Draw) -> Inputs:
    """Return one image after five tokens and the time step."""
    length = 5 + 1 + 16
    return {
        "hidden_states": draw.pixels(),
        "timestep": draw.shares(),
        "input_ids": torch.arange(5).expand(draw.batch, 5),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(draw.batch, length, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(draw.batch, length),
    }


def _z_image(draw: Draw) -> Inputs:
    """Return images and prompts as lists, each of its own size."""
    images = [torch.randn(CHANNELS, 1, 8, 8, generator=draw.generator) for _ in range(draw.batch)]
    prompts = [torch.randn(draw.tokens, TEXT, generator=draw.generator) for _ in range(draw.batch)]
    return {"x": images, "t": draw.shares(), "cap_feats": prompts}


def _hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.pixels(),
        "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.text(),
        "encoder_hidden_states_llama3": torch.randn(2, draw.batch, draw.tokens, TEXT, generator=draw.generator),
        "pooled_embeds": draw.noise(TEXT),
    }


def _lumina_next(draw: Draw) -> Inputs:
    turns = torch.rand(384, 384, HEAD // 2, generator=draw.generator)
    inputs = {**image(draw), "encoder_mask": draw.mask(torch.float32), "cross_attention_kwargs": {}}
    return inputs | {"image_rotary_emb": torch.polar(torch.ones_like(turns), turns)}


def _qwen(draw: Draw) -> Inputs:
    return masked(packed(draw), draw, "encoder_hidden_states_mask") | {"img_shapes": [[(1, 4, 4)]] * draw.batch}


def _ernie_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.pixels(4, 32),
        "timestep": draw.steps(),
        "text_bth": draw.text(),
        "text_lens": torch.full((draw.batch,), draw.tokens),
    }


def _krea2(draw: Draw) -> Inputs:
    return {**packed(draw), "encoder_hidden_states": draw.noise(draw.tokens, 3, TEXT), "position_ids": torch.zeros(draw.tokens + 16, 3)}


def _qwen_image21(draw: Draw) -> Inputs:
    return masked(packed(draw), draw, "encoder_hidden_states_mask") | {
        "img_shapes": [[(1, 4, 4)]] * draw.batch,
        "img_mask": (torch.arange(draw.tokens + 4) >= draw.tokens).expand(draw.batch, -1),
    }


def _prior(draw: Draw) -> Inputs:
    """Return the embedding of an image instead of its pixels."""
    inputs = {"hidden_states": draw.noise(TEXT), "proj_embedding": draw.noise(TEXT), "encoder_hidden_states": draw.text()}
    return inputs | {"timestep": draw.whole_steps()}


def _glm(draw: Draw) -> Inputs:
    """Return an image with the tokens that an autoregressive model gave for it."""
    tokens = {"prior_token_id": torch.arange(16).expand(draw.batch, 16), "prior_token_drop": torch.zeros(draw.batch, 16, dtype=torch.bool)}
    sizes = {"target_size": draw.full(8.0, 2), "crop_coords": draw.full(0.0, 2)}
    return {**image(draw), "timestep": draw.whole_steps(), **tokens, **sizes}


def _ideogram(draw: Draw) -> Inputs:
    """Return text and patches in one row, with the role of each place: 3 for text, 2 for patches."""
    length = draw.tokens + 16
    roles = torch.full((draw.batch, length), 2)
    roles[:, : draw.tokens] = 3
    positions = torch.arange(length).view(1, length, 1).expand(draw.batch, length, 3)
    inputs = {"hidden_states": draw.noise(length, 32), "timestep": draw.shares(), "encoder_hidden_states": draw.noise(length, TEXT)}
    return {**inputs, "position_ids": positions, "segment_ids": torch.zeros_like(roles), "indicator": roles}


def _joy_plus(draw: Draw) -> Inputs:
    patches = {"hidden_states": draw.noise(16, CHANNELS, 1, 2, 2), "shape_list": [[(1, 4, 4)]] * draw.batch}
    return masked(image(draw), draw, "encoder_hidden_states_mask") | patches


DENOISERS: dict[str, Denoiser] = {
    "DiTTransformer2DModel": Denoiser(
        lambda d: {"hidden_states": d.pixels(), "timestep": d.steps(), "class_labels": torch.tensor([1, 2])[: d.batch]},
        {**PIXELS, "num_layers": 3, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
    ),
    "PixArtTransformer2DModel": Denoiser(
        image,
        {
            **PIXELS, "out_channels": CHANNELS, "num_layers": 3, "cross_attention_dim": WIDTH, "caption_channels": TEXT,
            "norm_num_groups": 4, "use_additional_conditions": False,
        },
    ),
    "SD3Transformer2DModel": Denoiser(
        lambda d: pooled(image(d), d),
        {
            **PIXELS, "out_channels": CHANNELS, "num_layers": 3, "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH,
            "pooled_projection_dim": TEXT, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
    ),
    "FluxTransformer2DModel": Denoiser(
        lambda d: guided(pooled(placed(d), d), d),
        {**JOINT, "pooled_projection_dim": TEXT, "guidance_embeds": True},
    ),
    "Flux2Transformer2DModel": Denoiser(
        lambda d: guided(packed(d) | d.positions(4), d),
        {**JOINT, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": True},
    ),
    "ChromaTransformer2DModel": Denoiser(
        placed,
        {**JOINT, "approximator_num_channels": 32, "approximator_hidden_dim": 32, "approximator_layers": 2},
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
        image,
        {
            **SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": HEAD, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8,
        },
    ),
    "Lumina2Transformer2DModel": Denoiser(
        lambda d: masked(image(d), d),
        {
            "sample_size": 8, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 2,
            "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32, "axes_dim_rope": ROPE, "axes_lens": (64, 64, 64),
            "cap_feat_dim": TEXT,
        },
    ),
    "LuminaNextDiT2DModel": Denoiser(
        _lumina_next,
        {
            "sample_size": 8, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2,
            "multiple_of": 32, "cross_attention_dim": TEXT,
        },
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        lambda d: image(d) | {"timestep": d.shares()},
        {
            **PIXELS, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 64,
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
            "in_channels": CHANNELS, "dim": 96, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": TEXT,
            "axes_dims": [8, 8, 8], "axes_lens": [128, 64, 64],
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
        lambda d: masked(image(d), d, "attention_mask") | {"timestep": d.shares()},
        {
            "in_channels": CHANNELS, "context_in_dim": TEXT, "hidden_size": WIDTH, "num_heads": 4, "depth": 3, "axes_dim": [8, 8],
            "mlp_ratio": 2.0,
        },
    ),
    "BriaFiboTransformer2DModel": Denoiser(
        lambda d: placed(d) | {"text_encoder_layers": [d.text() for _ in range(4)]},
        {**JOINT, "text_encoder_dim": TEXT, "axes_dims_rope": list(ROPE)},
    ),
    "ErnieImageTransformer2DModel": Denoiser(
        _ernie_image,
        {
            "hidden_size": WIDTH, "num_attention_heads": 4, "num_layers": 3, "ffn_hidden_size": 96, "in_channels": 32, "out_channels": 32,
            "text_in_dim": TEXT, "rope_axes_dim": ROPE,
        },
    ),
    "Flux3Transformer2DModel": Denoiser(
        lambda d: packed(d) | d.positions(4),
        {**JOINT, "cond_in_channels": 32, "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "GlmImageTransformer2DModel": Denoiser(_glm, {**GLM, "prior_vq_quantizer_codebook_size": 64}),
    "HunyuanImageTransformer2DModel": Denoiser(
        lambda d: masked({**image(d), "hidden_states": d.pixels(4, 32)}, d),
        {
            **SHAPE, "in_channels": 32, "out_channels": 32, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT,
            "rope_axes_dim": (8, 8),
        },
    ),
    "Krea2Transformer2DModel": Denoiser(
        _krea2,
        {
            **SHAPE, "in_channels": 32, "num_layers": 3, "num_key_value_heads": 2, "intermediate_size": 96, "timestep_embed_dim": 32,
            "text_hidden_dim": TEXT, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 96, "axes_dims_rope": ROPE,
        },
    ),
    "LongCatImageTransformer2DModel": Denoiser(placed, {**JOINT, "pooled_projection_dim": TEXT, "axes_dims_rope": list(ROPE)}),
    "NucleusMoEImageTransformer2DModel": Denoiser(
        lambda d: masked(packed(d), d, "encoder_hidden_states_mask") | {"img_shapes": [[(1, 4, 4)]] * d.batch},
        {
            **SHAPE, "in_channels": 32, "out_channels": CHANNELS, "num_layers": 5, "num_key_value_heads": 2, "joint_attention_dim": TEXT,
            "axes_dims_rope": ROPE, "num_experts": 4, "moe_intermediate_dim": 64, "capacity_factors": 2.0,
        },
    ),
    "OvisImageTransformer2DModel": Denoiser(placed, {**JOINT, "out_channels": 32}),
    "PriorTransformer": Denoiser(_prior, {**SHAPE, "num_layers": 3, "embedding_dim": TEXT, "num_embeddings": 7}, tokens=7),
    "QwenImage21Transformer2DModel": Denoiser(
        _qwen_image21,
        {**SHAPE, "in_channels": 32, "out_channels": 32, "num_layers": 3, "context_in_dim": TEXT, "axes_dims_rope": ROPE},
    ),
    "Transformer2DModel": Denoiser(
        lambda d: {"hidden_states": d.pixels(8, 32), "encoder_hidden_states": d.text()},
        {**SHAPE, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": TEXT},
    ),
    "DreamLiteTransformer2DModel": Denoiser(
        lambda d: {"hidden_states": d.pixels(8, 32), "encoder_hidden_states": d.text()},
        {**SHAPE, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": TEXT},
    ),
    "Ideogram4Transformer2DModel": Denoiser(
        _ideogram,
        {
            **SHAPE, "in_channels": 32, "num_layers": 3, "intermediate_size": 96, "adaln_dim": 32, "llm_features_dim": TEXT,
            "mrope_section": (4, 2, 2),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Denoiser(
        _joy_plus,
        {
            "in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": 4, "text_dim": TEXT, "num_layers": 3,
            "rope_dim_list": list(ROPE),
        },
    ),
}  # fmt: skip
