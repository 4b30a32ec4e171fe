"""Denoisers of video and audio, tiny."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.draws import CHANNELS, HEAD, SHAPE, TEXT, WIDTH, Denoiser, Draw

Inputs = dict[str, Any]
ROPE = (4, 6, 6)
IN_OUT: Inputs = {**SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS}
WAN: Inputs = {**IN_OUT, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 128, "num_layers": 3, "rope_max_seq_len": 32}


def conditioned(draw: Draw) -> Inputs:
    return {"hidden_states": draw.video(), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}


def _ltx(draw: Draw) -> Inputs:
    grid = {"num_frames": 2, "height": 4, "width": 4}
    inputs = {"hidden_states": draw.noise(32, 32), "timestep": draw.steps(), "encoder_hidden_states": draw.text()}
    return inputs | grid | {"encoder_attention_mask": draw.mask(torch.float32)}


def _hunyuan(draw: Draw) -> Inputs:
    return {
        **conditioned(draw), "timestep": draw.whole_steps(), "encoder_attention_mask": draw.mask(),
        "pooled_projections": draw.noise(TEXT), "guidance": draw.full(3.5),
    }  # fmt: skip


def _allegro(draw: Draw) -> Inputs:
    masks = {"attention_mask": draw.full(1.0, 2, 8, 8), "encoder_attention_mask": draw.mask(torch.float32)}
    return conditioned(draw) | masks | {"image_rotary_emb": None}


def _cosmos(draw: Draw) -> Inputs:
    padding = torch.zeros(1, 1, 8, 8)
    return conditioned(draw) | {"timestep": draw.shares(), "fps": 8, "padding_mask": padding}


def _kandinsky(draw: Draw) -> Inputs:
    places = [torch.arange(2), torch.arange(4), torch.arange(4)]
    return {
        "hidden_states": draw.noise(2, 8, 8, CHANNELS), "timestep": draw.steps(), "encoder_hidden_states": draw.text(),
        "pooled_projections": draw.noise(TEXT), "visual_rope_pos": places, "text_rope_pos": torch.arange(draw.tokens),
    }  # fmt: skip


def _stable_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.noise(32, 16), "timestep": draw.steps(), "encoder_hidden_states": draw.text(),
        "global_hidden_states": draw.noise(1, 32), "rotary_embedding": draw.angles(17, HEAD // 2),
    }  # fmt: skip


DENOISERS: dict[str, Denoiser] = {
    "WanTransformer3DModel": Denoiser(conditioned, WAN),
    "SkyReelsV2Transformer3DModel": Denoiser(conditioned, WAN),
    "CogVideoXTransformer3DModel": Denoiser(
        lambda d: conditioned(d) | {"hidden_states": d.noise(3, CHANNELS, 8, 8), "timestep": d.whole_steps()},
        {
            **IN_OUT, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 8, "sample_height": 8,
            "sample_frames": 9, "max_text_seq_length": 7,
        },
        tokens=7,
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        _ltx, {**SHAPE, "in_channels": 32, "out_channels": 32, "cross_attention_dim": WIDTH, "num_layers": 3, "caption_channels": TEXT}
    ),
    "HunyuanVideoTransformer3DModel": Denoiser(
        _hunyuan,
        {
            **IN_OUT, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "text_embed_dim": TEXT,
            "pooled_projection_dim": TEXT, "rope_axes_dim": ROPE,
        },
    ),
    "MochiTransformer3DModel": Denoiser(
        lambda d: conditioned(d) | {"encoder_attention_mask": d.mask()},
        {
            **SHAPE, "num_layers": 3, "pooled_projection_dim": TEXT, "in_channels": CHANNELS, "text_embed_dim": TEXT,
            "time_embed_dim": 32, "max_sequence_length": 7,
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
        lambda d: conditioned(d) | {"timestep": d.whole_steps()},
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
        conditioned,
        {
            **IN_OUT, "patch_size": 2, "sample_width": 8, "sample_height": 8, "num_layers": 3, "mmdit_layers": 2,
            "time_embed_dim": 32, "text_embed_dim": TEXT, "time_position_encoding_type": "3d_rope",
        },
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        _kandinsky,
        {
            "in_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32, "out_visual_dim": CHANNELS,
            "model_dim": WIDTH, "ff_dim": 96, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": ROPE,
        },
    ),
    "StableAudioDiTModel": Denoiser(
        _stable_audio,
        {
            **SHAPE, "sample_size": 16, "in_channels": 32, "num_layers": 3, "num_key_value_attention_heads": 2, "out_channels": 32,
            "cross_attention_dim": 32, "time_proj_dim": 32, "global_states_input_dim": 32, "cross_attention_input_dim": 32,
        },
    ),
}  # fmt: skip
