"""Overrides of single types of configurations: what the small sizes get wrong, and kinds of layers that the defaults do not show."""

from __future__ import annotations

from typing import Any

SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# The last two layers take the keys and values of the first two.
SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
PER_LAYER = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
GEMMA4 = SHARED_KEYS | PER_LAYER
DOTS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
BLT = {"hidden_size_global": 64}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "ple_layer_ids": [1], "ngram_vocab_size_base": 128, "heads_per_ngram": 4, "split_ngram_parts": 1, "hc_lowrank": 32,
}  # fmt: skip

CODES = {f"IMGIMG{chr(ord('A') + code // 10)}{chr(ord('A') + code % 10)}Z": 100 + code for code in range(64)}
VQ = {
    "base_channels": 32, "channel_multiplier": (1, 1, 2, 2), "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32,
    "num_embeddings": 64,
}  # fmt: skip
FLORENCE = {
    "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True),
    "embed_dim": (32, 64), "num_heads": (2, 4), "num_groups": (2, 4), "window_size": 4, "projection_dim": 64,
}  # fmt: skip
# The real vision tower is a model of timm; without timm a ViT of transformers stands in its place.
CLIP_FOR_TIMM = {"model_type": "clip_vision_model", "model_args": {"embed_dim": 64}}
CONVNEXT_FOR_TIMM = {"model_type": "convnext", "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "hidden_size": 64}
TWO_TILES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},  # queries for an image of 16 patches
    "axk2": {"gated_norm_rank": 32},
    "bamba": {"attn_layer_indices": [1]},  # one attention layer among state-space layers
    "blt": {
        "encoder_hash_byte_group_vocab": 512, "patcher_config": BLT, "encoder_config": BLT, "decoder_config": BLT, "global_config": BLT,
    },
    "chameleon": {"vocabulary_map": {"<image>": 250, **CODES}, "vq_config": VQ},  # names of the codes of images
    "cohere2_moe": {"first_k_dense_replace": 1},  # one dense layer before those with experts
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "sliding_attention": None,
        },
        **SLIDING,
    },
    "cpmant": {"dim_ff": 96},
    "dbrx": {  # the attention reads rope_theta, which its configuration lacks
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_key_value_heads": 4},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "deepseek_v4": {"o_groups": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64}, "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS,
    "emu3": {
        "vocabulary_map": {"<image>": 250, "<|extra_200|>": 248, **{f"<|visual token {code:06d}|>": 100 + code for code in range(64)}},
        "vq_config": {**VQ, "embed_dim": 4, "latent_channels": 4, "num_attention_heads": 1, "attn_resolutions": (3,)},
    },
    "encoder-decoder": {"encoder": {"is_decoder": False}, "decoder": {"add_cross_attention": True}},
    "ernie4_5_vl_moe": {  # sections for height and width are alike
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [64, 32],
        },
    },
    "evolla": {
        "aligner_num_add_layers": 1, "resampler_depth": 2, "resampler_dim_head": 16, "resampler_heads": 4, "resampler_num_latents": 8,
        "protein_encoder_config": {"is_decoder": False},
    },
    "falcon_h1": {"mamba_d_ssm": 128},  # two times the hidden size, as the class demands
    "falcon_mamba": {"time_step_rank": 32},
    "fast_vlm": {"vision_config": CONVNEXT_FOR_TIMM},
    "florence2": {"vision_config": FLORENCE},
    "gemma3": {"mm_tokens_per_image": 4},  # 2 x 2 of 4 x 4 patches
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "laurel_rank": 32, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.5] + [0.0] * 5, "intermediate_size": 96, **PER_LAYER,
    },
    "gemma4_text": GEMMA4,
    "glm5_next": {  # the class refuses rotary positions
        "text_config": {"qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 4, "linear_head_dim": 32, "linear_num_heads": 4},
    },
    "glm5_next_vision": {"projection_intermediate_size": 96},
    "glmasr_encoder": {"intermediate_size": 256},  # as wide as four frames
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granite4_vision": {
        "deepstack_layer_map": [(0, 0), (1, 1)], "downsample_rate": "1/2", "spatial_target_layers": [0, 1, 2, 3],
        "text_config": {"num_hidden_layers": 4}, **TWO_TILES,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},  # the default has no attention
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "inkling2_vision": {"projection_hidden_dim": 64},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "instructblip": {"num_query_tokens": 8},
    "instructblipvideo": {"num_query_tokens": 8},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3, "num_hidden_layers": 3, "mamba_dt_rank": 32},
    "janus": {"vq_config": VQ},
    "kimi_linear": {"linear_head_dim": 32, "linear_num_heads": 4},
    "kosmos-2": {"latent_query_num": 8},
    "kosmos-2.5": {"latent_query_num": 8},
    "laguna": SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},  # the default has attention only
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4": {"vision_config": {"intermediate_size": 256}},  # the adapter reads four patches as one row of this width
    "llava_next": TWO_TILES,
    "llava_next_video": TWO_TILES,
    "llava_onevision": TWO_TILES,
    "longcat_flash": {"zero_expert_num": 2},
    "mamba": {"time_step_rank": 32},
    "mamba2": {"num_heads": 8, "hidden_size": 64, "head_dim": 16},
    "mellum": {"mlp_layer_types": ["dense", "sparse", "sparse"], **SLIDING},
    "minicpm_ocr": {"insert_layer_id": 1},
    "minicpmv4_6": {"insert_layer_id": 1},
    "minicpmv4_7": {"insert_layer_id": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2,
    },
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192, "num_global_layers": 1},
        "text_config": {"cross_attention_layers": [1]},
    },
    "molmo2": {"image_patch_id": 250, "vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [2, 1]}},
    "moshi": {"ffn_dim": 128},
    "muse_glimmer": {"out_hidden_size": 256},  # four patches side by side
    "muse_spark": {
        "out_hidden_size": 256, "audio_config": {"num_hidden_layers": 4, "hidden_sizes": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    },
    "muse_spark_text": {"moe_hidden_size": 64},
    "mvp": {"prompt_mid_dim": 64},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},  # the class demands that both sizes agree
    "paddleocr_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},
    "perception_lm": {"vision_config": CLIP_FOR_TIMM},
    "phi4_multimodal": {"audio_config": {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 32}},
    "pp_formulanet_vision": {"post_conv_out_channels": 64, "post_conv_mid_channels": 64},
    "qianfan_ocr_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"intermediate_size": 128},
    "reformer": {
        "axial_pos_shape": (4, 8), "axial_pos_embds_dim": (16, 48), "attn_layers": ["local", "lsh", "local"], "attention_head_size": 16,
        "feed_forward_size": 96, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2, "hash_seed": 0,
    },
    "roc_bert": {"shape_vocab_size": 256, "pronunciation_vocab_size": 256, "shape_embed_dim": 32, "pronunciation_embed_dim": 32},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5_vision": {"mlp_ratio": 1.5},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "vipllava": {"vision_feature_layer": (-1, -2)},
    "vision-encoder-decoder": {"decoder": {"add_cross_attention": True}},
    "voxtral_encoder": {"intermediate_size": 256},  # the projector reads four frames as one row of this width
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},  # a model without a default language asks for one with each forward
    "youtu": {"pad_token_id": None},  # transformers 5.23 zeroes the padding row of the embedding when it loads a checkpoint
    "zamba": {  # attention reads hidden states beside embeddings
        "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "num_key_value_heads": 4, "attention_head_dim": 32,
        "attention_hidden_size": 128, "mamba_dt_rank": 32,
    },
    "zaya": {"num_experts_per_tok": 1},  # the class refuses more
}  # fmt: skip
"""Overrides by model type, for a nested configuration as well as for a whole model."""
