"""ControlNets of diffusers, tiny: denoisers of the condition that add to the blocks of another denoiser."""

from __future__ import annotations

import torch

from tests.architectures.draws import CHANNELS, HEAD, SHAPE, TEXT, WIDTH, Denoiser, Draw, Inputs, image, masked, packed, placed, pooled

ROPE = (4, 6, 6)
PIXELS: Inputs = {**SHAPE, "in_channels": CHANNELS, "sample_size": 8, "patch_size": 2}
UNET: Inputs = {
    "in_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT,
    "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "conditioning_embedding_out_channels": (16, 32, 32, 64),
}  # fmt: skip


def _unet(draw: Draw) -> Inputs:
    inputs = {"sample": draw.pixels(16, 4), "timestep": draw.whole_steps(), "encoder_hidden_states": draw.text()}
    return inputs | {"controlnet_cond": draw.pixels(128, 3)}


def _sparse(draw: Draw) -> Inputs:
    """Return two frames, of which the first has a condition."""
    known = torch.zeros(draw.batch, 1, 2, 16, 16)
    known[:, :, 0] = 1
    return {
        "sample": draw.noise(4, 2, 16, 16), "timestep": draw.whole_steps(), "controlnet_cond": draw.noise(4, 2, 16, 16),
        "encoder_hidden_states": draw.text().repeat_interleave(2, dim=0), "conditioning_mask": known,
    }  # fmt: skip


def _hunyuan(draw: Draw) -> Inputs:
    return {
        **image(draw), "controlnet_cond": draw.pixels(), "text_embedding_mask": draw.full(1.0, 4),
        "encoder_hidden_states_t5": draw.text(), "text_embedding_mask_t5": draw.full(1.0, 4), "image_meta_size": draw.full(1.0, 6),
        "style": torch.zeros(draw.batch, dtype=torch.long), "image_rotary_emb": draw.angles(16),
    }  # fmt: skip


def _qwen(draw: Draw) -> Inputs:
    inputs = masked(packed(draw), draw, "encoder_hidden_states_mask")
    return inputs | {"controlnet_cond": draw.patches(), "img_shapes": [[(1, 4, 4)]] * draw.batch}


DENOISERS: dict[str, Denoiser] = {
    "ControlNetModel": Denoiser(_unet, UNET),
    "FluxControlNetModel": Denoiser(
        lambda d: pooled(placed(d), d) | {"controlnet_cond": d.patches()},
        {
            **SHAPE, "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT,
            "axes_dims_rope": list(ROPE), "pooled_projection_dim": TEXT,
        },
    ),
    "HunyuanDiT2DControlNetModel": Denoiser(
        _hunyuan,
        {
            **PIXELS, "hidden_size": WIDTH, "transformer_num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": TEXT,
            "cross_attention_dim_t5": TEXT, "pooled_projection_dim": TEXT, "text_len": 4, "text_len_t5": 4,
        },
        tokens=4,
    ),
    "QwenImageControlNetModel": Denoiser(
        _qwen,
        {**SHAPE, "in_channels": 32, "out_channels": CHANNELS, "num_layers": 2, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE},
    ),
    "SD3ControlNetModel": Denoiser(
        lambda d: pooled(image(d), d) | {"controlnet_cond": d.pixels()},
        {
            **PIXELS, "out_channels": CHANNELS, "num_layers": 2, "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH,
            "pooled_projection_dim": TEXT, "pos_embed_max_size": 8,
        },
    ),
    "SanaControlNetModel": Denoiser(
        lambda d: image(d) | {"controlnet_cond": d.pixels()},
        {
            **SHAPE, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": HEAD, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8,
        },
    ),
    "SparseControlNetModel": Denoiser(
        _sparse,
        {
            "in_channels": 4, "conditioning_channels": 4, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT,
            "attention_head_dim": 4, "num_attention_heads": 4, "motion_num_attention_heads": 4, "motion_max_seq_length": 4,
            "use_simplified_condition_embedding": True,
        },
    ),
    "UNetControlNetXSModel": Denoiser(
        _unet,
        {
            "sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64), "norm_num_groups": 8,
            "cross_attention_dim": TEXT, "num_attention_heads": 4, "ctrl_block_out_channels": (32, 32), "ctrl_num_attention_heads": 4,
            "ctrl_max_norm_num_groups": 8, "ctrl_conditioning_embedding_out_channels": (16, 32, 32, 64),
        },
    ),
}  # fmt: skip
