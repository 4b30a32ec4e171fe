"""UNets of diffusers, tiny."""

from __future__ import annotations

import torch

from tests.architectures.draws import TEXT, WIDTH, Denoiser, Draw, Inputs

UNET_3D: Inputs = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 8,
    "cross_attention_dim": TEXT, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}  # fmt: skip
UNET: Inputs = {
    **UNET_3D, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def unet(draw: Draw) -> Inputs:
    return {"sample": draw.pixels(16, 4), "timestep": draw.whole_steps(), "encoder_hidden_states": draw.text()}


def _sdxl(draw: Draw) -> Inputs:
    return unet(draw) | {"added_cond_kwargs": {"text_embeds": draw.noise(TEXT), "time_ids": draw.full(1.0, 6)}}


def _motion(draw: Draw) -> Inputs:
    return {**unet(draw), "encoder_hidden_states": draw.text().repeat_interleave(2, dim=0), "sample": draw.noise(4, 2, 16, 16)}


def _spatio_temporal(draw: Draw) -> Inputs:
    return {
        "sample": draw.noise(2, 8, 16, 16),
        "timestep": draw.whole_steps()[0],
        "encoder_hidden_states": draw.noise(1, TEXT),
        "added_time_ids": draw.full(1.0, 3),
    }


def _i2vgen(draw: Draw) -> Inputs:
    return {
        **unet(draw),
        "sample": draw.noise(4, 2, 16, 16),
        "fps": torch.full((draw.batch,), 8),
        "image_latents": draw.noise(4, 2, 16, 16),
        "image_embeddings": draw.noise(TEXT),
    }


def _cascade(draw: Draw) -> Inputs:
    return {
        "sample": draw.pixels(8, 4),
        "timestep_ratio": draw.shares(),
        "clip_text_pooled": draw.noise(1, TEXT),
        "clip_text": draw.text(),
        "clip_img": draw.noise(1, TEXT),
    }


def _audio(draw: Draw) -> Inputs:
    """Return a spectrogram with the prompt from two encoders."""
    second = {"encoder_hidden_states_1": draw.text(), "encoder_attention_mask_1": draw.mask()}
    return unet(draw) | {"encoder_attention_mask": draw.mask()} | second


DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(unet, UNET),
    "UNet2DConditionModel-sdxl": Denoiser(
        _sdxl,
        {
            **UNET, "transformer_layers_per_block": 2, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 128,
        },
        class_name="UNet2DConditionModel",
    ),
    "UNet2DModel": Denoiser(
        lambda d: {"sample": d.pixels(16, 3), "timestep": d.whole_steps()},
        {
            "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1,
            "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16,
        },
    ),
    "UNet3DConditionModel": Denoiser(lambda d: {**unet(d), "sample": d.noise(4, 2, 16, 16)}, {**UNET_3D}),
    "UNetMotionModel": Denoiser(
        _motion,
        {
            "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "cross_attention_dim": TEXT, "num_attention_heads": 4,
            "motion_num_attention_heads": 4, "motion_max_seq_length": 4,
        },
    ),
    "UNetSpatioTemporalConditionModel": Denoiser(
        _spatio_temporal,
        {
            "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96, "cross_attention_dim": TEXT, "num_attention_heads": (4, 4), "num_frames": 2,
        },
    ),
    "I2VGenXLUNet": Denoiser(_i2vgen, {**UNET_3D, "attention_head_dim": 16}),
    "Kandinsky3UNet": Denoiser(
        lambda d: {**unet(d), "encoder_attention_mask": d.mask()},
        {
            "in_channels": 4, "time_embedding_dim": 64, "groups": 8, "attention_head_dim": 16, "layers_per_block": 2,
            "block_out_channels": (64, 64, 64), "cross_attention_dim": TEXT, "encoder_hid_dim": TEXT,
        },
    ),
    "StableCascadeUNet": Denoiser(
        _cascade,
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 32, "patch_size": 1, "conditioning_dim": WIDTH,
            "block_out_channels": (64, 64), "num_attention_heads": (4, 4), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            "clip_text_in_channels": TEXT, "clip_text_pooled_in_channels": TEXT, "clip_image_in_channels": TEXT, "clip_seq": 4,
            "kernel_size": 3, "switch_level": (False,),
        },
    ),
    "UNet1DModel": Denoiser(
        lambda d: {"sample": d.noise(2, 32), "timestep": d.whole_steps()},
        {
            "sample_size": 32, "in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        },
    ),
    "AudioLDM2UNet2DConditionModel": Denoiser(_audio, {**UNET, "cross_attention_dim": (TEXT, TEXT)}),
    "DreamLiteUNetModel": Denoiser(unet, UNET),
}  # fmt: skip
