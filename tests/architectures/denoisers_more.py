"""More denoisers."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.denoisers_image import COGVIEW, JOINT, UNET, conditioned, guided, masked, packed, placed, pooled, unet
from tests.architectures.denoisers_video import IN_OUT, WAN
from tests.architectures.denoisers_video import conditioned as video
from tests.architectures.draws import CHANNELS, HEAD, SHAPE, TEXT, WIDTH, Denoiser, Draw

Inputs = dict[str, Any]
ROPE = (4, 6, 6)


def _glm(d: Draw) -> Inputs:
    return {
        **conditioned(d), "timestep": d.whole_steps(), "prior_token_id": torch.arange(16).expand(d.batch, 16),
        "prior_token_drop": torch.zeros(d.batch, 16, dtype=torch.bool), "target_size": d.full(8.0, 2), "crop_coords": d.full(0.0, 2),
    }


def _prior(d: Draw) -> Inputs:
    return {"hidden_states": d.noise(TEXT), "timestep": d.whole_steps(), "proj_embedding": d.noise(TEXT), "encoder_hidden_states": d.text()}


def _ltx2(d: Draw) -> Inputs:
    return {
        "hidden_states": d.noise(32, 32), "audio_hidden_states": d.noise(8, 32), "encoder_hidden_states": d.text(),
        "audio_encoder_hidden_states": d.text(), "timestep": d.steps(), "num_frames": 2, "height": 4, "width": 4,
        "audio_num_frames": 8, "encoder_attention_mask": d.mask(torch.float32), "audio_encoder_attention_mask": d.mask(torch.float32),
    }

DENOISERS: dict[str, Denoiser] = {
    "AnyFlowTransformer3DModel": Denoiser(lambda d: {**video(d), "hidden_states": d.noise(2, CHANNELS, 8, 8), "timestep": d.full(500.0, 2), "r_timestep": d.full(40.0, 2)}, WAN),
    "AceStepTransformer1DModel": Denoiser(lambda d: {"hidden_states": d.noise(8, 32), "timestep": d.shares(), "timestep_r": d.shares(), "encoder_hidden_states": d.text(), "context_latents": d.noise(8, 64)},
       {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "in_channels": 96, "audio_acoustic_hidden_dim": 32, "encoder_hidden_size": TEXT, "sliding_window": 4}),
    "BriaFiboTransformer2DModel": Denoiser(lambda d: placed(d) | {"text_encoder_layers": [d.text() for _ in range(4)]}, {**JOINT, "text_encoder_dim": TEXT, "axes_dims_rope": list(ROPE)}),
    "ChronoEditTransformer3DModel": Denoiser(video, WAN),
    "ConsisIDTransformer3DModel": Denoiser(lambda d: {**video(d), "hidden_states": d.noise(3, CHANNELS, 8, 8), "timestep": d.whole_steps()}, {**IN_OUT, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 7}, tokens=7),
    "ErnieImageTransformer2DModel": Denoiser(lambda d: {"hidden_states": d.image(4, 32), "timestep": d.steps(), "text_bth": d.text(), "text_lens": torch.full((d.batch,), d.tokens)}, {"hidden_size": WIDTH, "num_attention_heads": 4, "num_layers": 3, "ffn_hidden_size": 96, "in_channels": 32, "out_channels": 32, "text_in_dim": TEXT, "rope_axes_dim": ROPE}),
    "Flux3Transformer2DModel": Denoiser(lambda d: packed(d) | d.positions(4), {**{k: v for k, v in JOINT.items()}, "cond_in_channels": 32, "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}),
    "GlmImageTransformer2DModel": Denoiser(_glm, {**{k: v for k, v in COGVIEW.items() if k not in ("sample_size", "pos_embed_max_size")}, "prior_vq_quantizer_codebook_size": 64}),
    "HeliosTransformer3DModel": Denoiser(lambda d: video(d), {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": ROPE, "has_multi_term_memory_patch": False, "guidance_cross_attn": False, "zero_history_timestep": False}),
    "HunyuanImageTransformer2DModel": Denoiser(lambda d: masked({**conditioned(d), "hidden_states": d.image(4, 32)}, d), {**SHAPE, "in_channels": 32, "out_channels": 32, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT, "rope_axes_dim": (8, 8)}),
    "HunyuanVideo15Transformer3DModel": Denoiser(lambda d: masked(video(d), d) | {"encoder_hidden_states_2": d.text(), "encoder_attention_mask_2": d.mask(), "image_embeds": d.noise(4, 32)}, {**IN_OUT, "num_layers": 3, "text_embed_dim": TEXT, "text_embed_2_dim": TEXT, "image_embed_dim": 32, "rope_axes_dim": ROPE}),
    "HunyuanVideoFramepackTransformer3DModel": Denoiser(lambda d: guided(pooled(masked(video(d), d), d), d) | {"image_embeds": d.noise(4, 32), "indices_latents": torch.arange(2), "latents_clean": d.video(1), "indices_latents_clean": torch.arange(1), "latents_history_2x": d.video(2), "indices_latents_history_2x": torch.arange(2), "latents_history_4x": d.video(4), "indices_latents_history_4x": torch.arange(4)}, {**IN_OUT, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT, "pooled_projection_dim": TEXT, "rope_axes_dim": ROPE, "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True}),
    "JoyImageEditTransformer3DModel": Denoiser(video, {"in_channels": CHANNELS, "hidden_size": WIDTH, "num_attention_heads": 4, "text_dim": TEXT, "num_layers": 3, "rope_dim_list": list(ROPE)}),
    "Kandinsky6Transformer3DModel": Denoiser(lambda d: {"hidden_states": d.noise(2, 8, 8, CHANNELS), "timestep": d.steps(), "encoder_hidden_states": d.text(), "pooled_projections": d.noise(TEXT)}, {"in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32, "model_dim": WIDTH, "ff_dim": 96, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": ROPE, "visual_cond": False}),
    "Krea2Transformer2DModel": Denoiser(lambda d: {**packed(d), "encoder_hidden_states": d.noise(d.tokens, 3, TEXT), "position_ids": torch.zeros(d.tokens + 16, 3)}, {**SHAPE, "in_channels": 32, "num_layers": 3, "num_key_value_heads": 2, "intermediate_size": 96, "timestep_embed_dim": 32, "text_hidden_dim": TEXT, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 96, "axes_dims_rope": ROPE}),
    "LTX2VideoTransformer3DModel": Denoiser(_ltx2, {**SHAPE, "in_channels": 32, "out_channels": 32, "cross_attention_dim": WIDTH, "audio_in_channels": 32, "audio_out_channels": 32, "audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": WIDTH, "num_layers": 3, "caption_channels": TEXT}),
    "LongCatAudioDiTTransformer": Denoiser(lambda d: {"hidden_states": d.noise(16, 32), "encoder_hidden_states": d.text(), "encoder_attention_mask": d.mask(), "timestep": d.shares(), "latent_cond": d.noise(16, 32)}, {"dit_dim": WIDTH, "dit_depth": 3, "dit_heads": 4, "dit_text_dim": TEXT, "latent_dim": 32, "ff_mult": 2.0}),
    "LongCatImageTransformer2DModel": Denoiser(placed, {**JOINT, "pooled_projection_dim": TEXT, "axes_dims_rope": list(ROPE)}),
    "MiniMaxMusic3Transformer1DModel": Denoiser(lambda d: {"hidden_states": d.noise(32, 16), "timestep": d.shares(), "encoder_hidden_states": d.noise(16, TEXT)}, {**SHAPE, "in_channels": 32, "condition_dim": TEXT, "num_layers": 3, "ff_inner_dim": 96, "rotary_dim": 8, "fourier_embedding_dim": 32}),
    "MotifVideoTransformer3DModel": Denoiser(lambda d: masked(video(d), d), {**IN_OUT, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": TEXT, "rope_axes_dim": ROPE}),
    "NucleusMoEImageTransformer2DModel": Denoiser(lambda d: masked(packed(d), d, "encoder_hidden_states_mask") | {"img_shapes": [[(1, 4, 4)]] * d.batch}, {**SHAPE, "in_channels": 32, "out_channels": CHANNELS, "num_layers": 5, "num_key_value_heads": 2, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE, "num_experts": 4, "moe_intermediate_dim": 64, "capacity_factors": 2.0}),
    "OvisImageTransformer2DModel": Denoiser(placed, {**JOINT, "out_channels": 32}),
    "PriorTransformer": Denoiser(_prior, {**SHAPE, "num_layers": 3, "embedding_dim": TEXT, "num_embeddings": 7}, tokens=7),
    "QwenImage21Transformer2DModel": Denoiser(lambda d: masked(packed(d), d, "encoder_hidden_states_mask") | {"img_shapes": [[(1, 4, 4)]] * d.batch, "img_mask": (torch.arange(d.tokens + 4) >= d.tokens).expand(d.batch, -1)}, {**SHAPE, "in_channels": 32, "out_channels": 32, "num_layers": 3, "context_in_dim": TEXT, "axes_dims_rope": ROPE}),
    "SanaVideoTransformer3DModel": Denoiser(video, {**IN_OUT, "num_layers": 3, "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8}),
    "StableAudio3DiTModel": Denoiser(lambda d: {"hidden_states": d.noise(32, 16), "timestep": d.shares(), "encoder_hidden_states": d.text(), "global_hidden_states": d.noise(32), "local_add_cond": d.noise(32, 16)}, {"io_channels": 32, "embed_dim": WIDTH, "depth": 3, "num_heads": 4, "cond_token_dim": TEXT, "global_cond_dim": 32, "local_add_cond_dim": 32, "timestep_features_dim": 32, "ff_mult": 2.0, "num_memory_tokens": 4}),
    "Transformer2DModel": Denoiser(lambda d: {"hidden_states": d.image(8, 32), "encoder_hidden_states": d.text()}, {**SHAPE, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": TEXT}),
    "TransformerTemporalModel": Denoiser(lambda d: {"hidden_states": torch.randn(2 * d.batch, 32, 4, 4, generator=d.generator), "num_frames": 2}, {**SHAPE, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8}),
    "WanVACETransformer3DModel": Denoiser(lambda d: video(d) | {"control_hidden_states": d.video(channels=CHANNELS)}, {**WAN, "vace_layers": [0, 2], "vace_in_channels": CHANNELS}),
    "WanAnimateTransformer3DModel": Denoiser(lambda d: {**video(d), "hidden_states": d.video(3, channels=20), "pose_hidden_states": d.video(2), "face_pixel_values": d.noise(3, 5, 16, 16), "encoder_hidden_states_image": d.noise(4, 32)}, {**WAN, "num_layers": 4, "in_channels": 20, "latent_channels": CHANNELS, "image_dim": 32, "motion_encoder_size": 16, "motion_style_dim": 32, "motion_dim": 8, "motion_encoder_dim": 32, "face_encoder_hidden_dim": 32, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}}),
    "UNet3DConditionModel": Denoiser(lambda d: {**unet(d), "sample": d.noise(4, 2, 16, 16)}, {**{k: v for k, v in UNET.items() if "block_types" not in k}, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}),
    "UNetMotionModel": Denoiser(lambda d: {**unet(d), "encoder_hidden_states": d.text().repeat_interleave(2, dim=0), "sample": d.noise(4, 2, 16, 16)}, {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "cross_attention_dim": TEXT, "num_attention_heads": 4, "motion_num_attention_heads": 4, "motion_max_seq_length": 4}),
    "UNetSpatioTemporalConditionModel": Denoiser(lambda d: {"sample": d.noise(2, 8, 16, 16), "timestep": d.whole_steps()[0], "encoder_hidden_states": d.noise(1, TEXT), "added_time_ids": d.full(1.0, 3)}, {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96, "cross_attention_dim": TEXT, "num_attention_heads": (4, 4), "num_frames": 2}),
    "I2VGenXLUNet": Denoiser(lambda d: {**unet(d), "sample": d.noise(4, 2, 16, 16), "fps": torch.full((d.batch,), 8), "image_latents": d.noise(4, 2, 16, 16), "image_embeddings": d.noise(TEXT)}, {**{k: v for k, v in UNET.items() if "block_types" not in k}, "attention_head_dim": 16, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}),
    "Kandinsky3UNet": Denoiser(lambda d: {**unet(d), "encoder_attention_mask": d.mask()}, {"in_channels": 4, "time_embedding_dim": 64, "groups": 8, "attention_head_dim": 16, "layers_per_block": 2, "block_out_channels": (32, 64, 64), "cross_attention_dim": TEXT, "encoder_hid_dim": TEXT}),
    "StableCascadeUNet": Denoiser(lambda d: {"sample": d.image(8, 4), "timestep_ratio": d.shares(), "clip_text_pooled": d.noise(1, TEXT), "clip_text": d.text(), "clip_img": d.noise(1, TEXT)}, {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 32, "patch_size": 1, "conditioning_dim": WIDTH, "block_out_channels": (64, 64), "num_attention_heads": (4, 4), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1), "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2, "clip_text_in_channels": TEXT, "clip_text_pooled_in_channels": TEXT, "clip_image_in_channels": TEXT, "clip_seq": 4, "kernel_size": 3, "switch_level": (False,)}),
    "UNet1DModel": Denoiser(lambda d: {"sample": d.noise(2, 32), "timestep": d.whole_steps()}, {"sample_size": 32, "in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "block_out_channels": (32, 32, 64), "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip")}),
}  # fmt: skip
