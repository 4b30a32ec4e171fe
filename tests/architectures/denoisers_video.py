"""Transformers of diffusers that denoise video, tiny."""

from __future__ import annotations

import torch

from tests.architectures.draws import CHANNELS, SHAPE, TEXT, WIDTH, Denoiser, Draw, Inputs, guided, masked, pooled, video

ROPE = (4, 6, 6)
IN_OUT: Inputs = {**SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS}
HELIOS: Inputs = {**IN_OUT, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 128, "num_layers": 3}
WAN: Inputs = {**HELIOS, "rope_max_seq_len": 32}
COGVIDEO: Inputs = {
    **IN_OUT, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 7,
}  # fmt: skip


def _ltx(draw: Draw) -> Inputs:
    grid = {"num_frames": 2, "height": 4, "width": 4}
    inputs = {"hidden_states": draw.noise(32, 32), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}
    return inputs | grid | {"encoder_attention_mask": draw.mask(torch.float32)}


def _hunyuan(draw: Draw) -> Inputs:
    return {
        **video(draw),
        "timestep": draw.whole_steps(),
        "encoder_attention_mask": draw.mask(),
        "pooled_projections": draw.noise(TEXT),
        "guidance": draw.full(3.5),
    }


def _allegro(draw: Draw) -> Inputs:
    masks = {"attention_mask": draw.full(1.0, 2, 8, 8), "encoder_attention_mask": draw.mask(torch.float32)}
    return video(draw) | masks | {"image_rotary_emb": None}


def _cosmos(draw: Draw) -> Inputs:
    padding = torch.zeros(1, 1, 8, 8)
    return video(draw) | {"timestep": draw.shares(), "fps": 8, "padding_mask": padding}


def _kandinsky(draw: Draw) -> Inputs:
    places = [torch.arange(2), torch.arange(4), torch.arange(4)]
    return {
        "hidden_states": draw.noise(2, 8, 8, CHANNELS),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
        "pooled_projections": draw.noise(TEXT),
        "visual_rope_pos": places,
        "text_rope_pos": torch.arange(draw.tokens),
    }


def _flow_map(draw: Draw) -> Inputs:
    return {
        **video(draw),
        "hidden_states": draw.noise(2, CHANNELS, 8, 8),
        "timestep": draw.full(500.0, 2),
        "r_timestep": draw.full(40.0, 2),
    }


def _hunyuan_1_5(draw: Draw) -> Inputs:
    return masked(video(draw), draw) | {
        "encoder_hidden_states_2": draw.text(),
        "encoder_attention_mask_2": draw.mask(),
        "image_embeds": draw.noise(4, 32),
    }


def _framepack(draw: Draw) -> Inputs:
    return guided(pooled(masked(video(draw), draw), draw), draw) | {
        "image_embeds": draw.noise(4, 32),
        "indices_latents": torch.arange(2),
        "latents_clean": draw.clip(1),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": draw.clip(2),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": draw.clip(4),
        "indices_latents_history_4x": torch.arange(4),
    }


def _kandinsky_6(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(2, 8, 8, CHANNELS),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
        "pooled_projections": draw.noise(TEXT),
    }


def _wan_animate(draw: Draw) -> Inputs:
    return {
        **video(draw),
        "hidden_states": draw.clip(3, channels=20),
        "pose_hidden_states": draw.clip(2),
        "face_pixel_values": draw.noise(3, 5, 16, 16),
        "encoder_hidden_states_image": draw.noise(4, 32),
    }


def _ltx2(draw: Draw) -> Inputs:
    """Return audio beside the video."""
    audio = {"audio_hidden_states": draw.noise(8, 32), "audio_encoder_hidden_states": draw.text(), "audio_num_frames": 8}
    return _ltx(draw) | audio | {"audio_encoder_attention_mask": draw.mask(torch.float32)}


def _sana_wm(draw: Draw) -> Inputs:
    """Return two frames with a time step of each."""
    prompt = {"encoder_hidden_states": draw.noise(1, draw.tokens, TEXT), "mask": draw.mask(torch.long)}
    return prompt | {"hidden_states": draw.clip(channels=32), "timestep": draw.steps().view(-1, 1, 1).expand(-1, 1, 2)}


DENOISERS: dict[str, Denoiser] = {
    "WanTransformer3DModel": Denoiser(video, WAN),
    "SkyReelsV2Transformer3DModel": Denoiser(video, WAN),
    "CogVideoXTransformer3DModel": Denoiser(
        lambda d: video(d) | {"hidden_states": d.noise(3, CHANNELS, 8, 8), "timestep": d.whole_steps()},
        {
            **IN_OUT, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 8, "sample_height": 8,
            "sample_frames": 9, "max_text_seq_length": 7,
        },
        tokens=7,
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        _ltx,
        {**SHAPE, "in_channels": 32, "out_channels": 32, "cross_attention_dim": WIDTH, "num_layers": 3, "caption_channels": TEXT},
    ),
    "HunyuanVideoTransformer3DModel": Denoiser(
        _hunyuan,
        {
            **IN_OUT, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "text_embed_dim": TEXT,
            "pooled_projection_dim": TEXT, "rope_axes_dim": ROPE,
        },
    ),
    "MochiTransformer3DModel": Denoiser(
        lambda d: video(d) | {"encoder_attention_mask": d.mask()},
        {
            "num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 3, "pooled_projection_dim": 96, "in_channels": CHANNELS,
            "text_embed_dim": TEXT, "time_embed_dim": 32, "max_sequence_length": 7,
        },
        tokens=7,
    ),
    "AllegroTransformer3DModel": Denoiser(
        _allegro,
        {
            **IN_OUT, "attention_head_dim": 24, "num_layers": 3, "cross_attention_dim": 96, "sample_height": 8, "sample_width": 8,
            "sample_frames": 4, "caption_channels": TEXT,
        },
    ),
    "LatteTransformer3DModel": Denoiser(
        lambda d: video(d) | {"timestep": d.whole_steps()},
        {
            **IN_OUT, "num_layers": 3, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8, "patch_size": 2,
            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "video_length": 2, "activation_fn": "gelu-approximate",
            "norm_elementwise_affine": False, "attention_bias": True,
        },
    ),
    "CosmosTransformer3DModel": Denoiser(
        _cosmos,
        {
            **IN_OUT, "num_layers": 3, "mlp_ratio": 2.0, "text_embed_dim": TEXT, "adaln_lora_dim": 32, "max_size": (4, 8, 8),
            "concat_padding_mask": False,
        },
    ),
    "EasyAnimateTransformer3DModel": Denoiser(
        video,
        {
            **IN_OUT, "patch_size": 2, "sample_width": 8, "sample_height": 8, "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 32,
            "text_embed_dim": TEXT, "time_position_encoding_type": "3d_rope",
        },
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        _kandinsky,
        {
            "in_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32, "out_visual_dim": CHANNELS,
            "model_dim": WIDTH, "ff_dim": 96, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": ROPE,
        },
    ),
    "AnyFlowTransformer3DModel": Denoiser(_flow_map, WAN),
    "ChronoEditTransformer3DModel": Denoiser(video, WAN),
    "ConsisIDTransformer3DModel": Denoiser(
        lambda d: {**video(d), "hidden_states": d.noise(3, CHANNELS, 8, 8), "timestep": d.whole_steps()},
        {
            **IN_OUT, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 8, "sample_height": 8,
            "sample_frames": 9, "max_text_seq_length": 7,
        },
        tokens=7,
    ),
    "HeliosTransformer3DModel": Denoiser(
        lambda d: video(d),
        {**HELIOS, "rope_dim": ROPE, "has_multi_term_memory_patch": False, "guidance_cross_attn": False, "zero_history_timestep": False},
    ),
    "HunyuanVideo15Transformer3DModel": Denoiser(
        _hunyuan_1_5,
        {**IN_OUT, "num_layers": 3, "text_embed_dim": TEXT, "text_embed_2_dim": TEXT, "image_embed_dim": 32, "rope_axes_dim": ROPE},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Denoiser(
        _framepack,
        {
            **IN_OUT, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT, "pooled_projection_dim": TEXT,
            "rope_axes_dim": ROPE, "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True,
        },
    ),
    "JoyImageEditTransformer3DModel": Denoiser(
        video,
        {
            "in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": 4, "text_dim": TEXT, "num_layers": 3,
            "rope_dim_list": list(ROPE),
        },
    ),
    "Kandinsky6Transformer3DModel": Denoiser(
        _kandinsky_6,
        {
            "in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32,
            "model_dim": WIDTH, "ff_dim": 96, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": ROPE, "in_audio_dim": 32,
            "out_audio_dim": 32, "visual_cond": False,
        },
    ),
    "LTX2VideoTransformer3DModel": Denoiser(
        _ltx2,
        {
            **SHAPE, "in_channels": 32, "out_channels": 32, "cross_attention_dim": WIDTH, "audio_in_channels": 32,
            "audio_out_channels": 32, "audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": WIDTH,
            "num_layers": 3, "caption_channels": TEXT,
        },
    ),
    "MotifVideoTransformer3DModel": Denoiser(
        lambda d: masked(video(d), d),
        {**IN_OUT, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT, "rope_axes_dim": ROPE},
    ),
    "SanaVideoTransformer3DModel": Denoiser(
        video,
        {
            **IN_OUT, "num_layers": 3, "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": WIDTH,
            "caption_channels": TEXT, "sample_size": 8,
        },
    ),
    "TransformerTemporalModel": Denoiser(
        lambda d: {"hidden_states": torch.randn(2 * d.batch, 32, 4, 4, generator=d.generator), "num_frames": 2},
        {**SHAPE, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8},
    ),
    "WanVACETransformer3DModel": Denoiser(
        lambda d: video(d) | {"control_hidden_states": d.clip(channels=CHANNELS)},
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": CHANNELS},
    ),
    "WanAnimateTransformer3DModel": Denoiser(
        _wan_animate,
        {
            **WAN, "num_layers": 4, "in_channels": 20, "latent_channels": CHANNELS, "image_dim": 32, "motion_encoder_size": 16,
            "motion_style_dim": 32, "motion_dim": 8, "motion_encoder_dim": 32, "face_encoder_hidden_dim": 32, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        },
    ),
    "AnyFlowFARTransformer3DModel": Denoiser(lambda d: _flow_map(d) | {"chunk_partition": (1, 1)}, {**WAN, "chunk_partition": (1, 1)}),
    "Kandinsky6SRTransformer3DModel": Denoiser(
        lambda d: {"hidden_states": d.noise(2, 16, 16, 17), "timestep": d.steps()},
        {
            "in_visual_dim": 8, "out_visual_dim": 8, "time_dim": 32, "model_dim": WIDTH, "ff_dim": 96, "num_visual_blocks": 3,
            "axes_dims": ROPE, "nabla_window": (3, 3, 3),
        },
    ),
    "SanaWMTransformer3DModel": Denoiser(
        _sana_wm,
        {
            "in_channels": 32, "num_layers": 4, "hidden_size": WIDTH, "num_attention_heads": 4, "linear_head_dim": 16,
            "caption_channels": TEXT, "mlp_ratio": 2.0, "image_size": 8, "fp32_attention": False, "use_chunk_plucker_post_attn": False,
        },
    ),
}  # fmt: skip
